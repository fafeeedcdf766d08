"""The commit beside a measurement."""

import subprocess

from programs import checkout


def test_commit_of_a_checkout_with_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "_ROOT", tmp_path)
    assert checkout.commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--message", "one")
    clean = checkout.commit()
    assert len(clean) == 12
    (tmp_path / "file").write_text("another")
    assert checkout.commit() == f"{clean}-dirty"


def test_no_commit_of_a_folder_within_another_checkout(tmp_path, monkeypatch):
    """As an installed wheel is within a project that has its environment inside."""
    subprocess.run(["git", "init"], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(checkout, "_ROOT", tmp_path / "site-packages")
    assert checkout.commit() is None
