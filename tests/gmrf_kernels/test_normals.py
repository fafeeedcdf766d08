"""The law of standard normal numbers, and what a seed means."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import banded_gmrf as bg
from gmrf_kernels import cpu, cpu_compile, cpu_plan, cpu_solve, simd_normals, standard_normal, use_backend
from gmrf_kernels.cpu_plan import Plan

DTYPES = [torch.float32, torch.float64]
MANY = 10_000_000


@pytest.fixture(autouse=True)
def keep_the_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def seeded(seed, *args, **options):
    torch.manual_seed(seed)
    return standard_normal(*args, **options)


# --- the generator ---

# Counter, key and words: `kat_vectors` of Random123 1.14, philox4x32 with 10 rounds.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def philox(counter, key):
    return [word % 2**32 for word in simd_normals.philox(counter, key)]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert philox(words(counter), words(key)) == words(expected)


def box_muller(uniform, angle):
    radius = np.sqrt(-2 * np.log(uniform))
    return radius * np.cos(angle), radius * np.sin(angle)


def expected_numbers(dtype, key, size):
    """The first numbers of a stream, from Python's integers and NumPy's functions in float64."""
    lanes, vectors = (16, 4) if dtype == torch.float32 else (8, 2)
    counters = range(-(-size // (lanes * vectors)) * lanes)
    drawn = np.array([philox([c, 0, 0, 0], [key % 2**32, key >> 32]) for c in counters]).T
    numbers = []
    if dtype == torch.float32:
        for first, second in (drawn[:2], drawn[2:]):
            uniform = (first + (second % 256 + 0.5) / 256) * 2.0**-32
            turn = second // 2**30 / 4 + (second % 2**30 // 256 + 0.5 - 2.0**21) * 2.0**-24
            numbers += box_muller(uniform, 2 * math.pi * turn)
    else:
        first, second, third, fourth = drawn
        uniform = (second * 2.0**21 + first // 2**11 + 1) * 2.0**-53
        turn = fourth // 2**30 / 4 + (fourth % 2**30 * 2.0**22 + third // 2**10 + 0.5 - 2.0**51) * 2.0**-54
        numbers += box_muller(uniform, 2 * math.pi * turn)
    blocks = np.stack(numbers).reshape(vectors, -1, lanes).swapaxes(0, 1)
    return torch.from_numpy(blocks.reshape(-1)[:size].copy())


# In float32 a uniform number near 1 is rounded by 2⁻²⁵, which moves a radius r by as much over r; 2e-5 for the smallest here.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 4e-15)])
@pytest.mark.parametrize("key", [0, 1, 0x299F31D0A4093822, 2**63 - 1])
def test_numbers_of_a_key(dtype, tolerance, key):
    actual = cpu.standard_normal((3333,), dtype, key)
    torch.testing.assert_close(actual.double(), expected_numbers(dtype, key, 3333), rtol=4e-7, atol=tolerance)


@pytest.mark.parametrize("block", [2**27, 2**40 + 3])
def test_counters_beyond_32_bits(block):
    """The numbers that a kernel finds far on in a stream, 2³³ and more of them."""
    source = simd_normals.source("float64", cache=False).replace("normals(key, block)", "normals(key, block + numbers - 16)")
    kernel = cpu_compile._execute(source.replace("w + 16 <= numbers", "True"), Path("numbers_far_on.py"))
    numbers = torch.zeros(2, 8, dtype=torch.float64)
    Plan(kernel, [5, numbers, block + 16], 1, 1)()
    drawn = [philox([(8 * block + i) % 2**32, (8 * block + i) >> 32, 0, 0], [5, 0]) for i in range(8)]
    uniform = [((second << 32 | first) // 2**11 + 1) * 2.0**-53 for first, second, _, _ in drawn]
    np.testing.assert_allclose(numbers.square().sum(0), -2 * np.log(uniform), rtol=1e-14)


# --- the law ---


@pytest.fixture(scope="module", params=DTYPES)
def many(request):
    torch.manual_seed(0)
    return standard_normal((MANY,), request.param).double().numpy()


# Probabilities of these tests to fail for right numbers: that of five standard errors, 6e-7, unless another is named. Seeds are
# fixed, so that they fail always or never.


def test_moments(many):
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
        assert abs((many**power).mean() - mean) < 5 * math.sqrt(variance / MANY), power


def test_kolmogorov_smirnov(many):
    assert scipy.stats.kstest(many, "norm").pvalue > 1e-3


@pytest.mark.parametrize("part", range(4))
def test_each_vector_of_a_block_has_the_law(many, part):
    """Cosines and sines of either pair of words, in float32; halves of these in float64."""
    own = many[: MANY // 64 * 64].reshape(-1, 4, 16)[:, part].reshape(-1)
    assert scipy.stats.kstest(own, "norm").pvalue > 1e-3


def test_tails(many):
    """As many numbers beyond 3, 4 and 5 as there should be, on either side."""
    for bound, side in itertools.product((3, 4, 5), (-1, 1)):
        expected = MANY * scipy.stats.norm.sf(bound)
        count = (side * many > bound).sum()
        # For 2.9 expected numbers these are 0 to 12.
        assert scipy.stats.poisson.cdf(count, expected) > 1e-5, (bound, side)
        assert scipy.stats.poisson.sf(count - 1, expected) > 1e-5, (bound, side)


@pytest.mark.parametrize(("dtype", "farthest"), [(torch.float32, 7.53), (torch.float64, 8.57)])
def test_the_tail_reaches_beyond_what_many_draws_need(dtype, farthest, monkeypatch):
    """Radii of the smallest uniform numbers, whatever the angle: 24 bits would end at 5.8, which large images pass."""
    monkeypatch.setattr(simd_normals, "philox", lambda counter, key: [counter[0], counter[2], counter[0], counter[2]])
    source = simd_normals.source("float32" if dtype == torch.float32 else "float64", cache=False)
    kernel = cpu_compile._execute(source, Path("numbers_of_small_words.py"))
    lanes = 16 if dtype == torch.float32 else 8
    numbers = torch.zeros(2, lanes, dtype=dtype)  # cosines and sines of the first words of the first counters
    Plan(kernel, [0, numbers, numbers.numel()], 1, 1)()
    words = np.arange(lanes)
    uniform = (words + 2.0**-9) * 2.0**-32 if dtype == torch.float32 else (words // 2**11 + 1) * 2.0**-53
    radii = numbers.double().square().sum(0).sqrt().numpy()
    np.testing.assert_allclose(radii, np.sqrt(-2 * np.log(uniform)), rtol=4 * torch.finfo(dtype).eps)
    assert abs(radii[0] - farthest) < 0.01


def test_numbers_beyond_five_follow_the_law():
    """Of 4 · 10⁸ numbers about 229 are beyond 5, and their excess has the conditional law."""
    torch.manual_seed(5)
    beyond = []
    for _ in range(40):
        x = standard_normal((MANY,), torch.float32)
        beyond.append(x[x.abs() > 5].abs().double())
    beyond = torch.cat(beyond).numpy()
    expected = 40 * MANY * 2 * scipy.stats.norm.sf(5)
    assert abs(len(beyond) - expected) < 5 * math.sqrt(expected)
    law = 1 - scipy.stats.norm.sf(beyond) / scipy.stats.norm.sf(5)
    assert scipy.stats.kstest(law, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 15, 16, 17, 32, 48, 63, 64, 65, 128, 1024])
def test_neighbours_are_independent(many, distance):
    """Their values and their squares: Box and Muller's pairs share a radius."""
    a, b = many[:-distance], many[distance:]
    assert abs((a * b).mean()) < 5 / math.sqrt(MANY)
    assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 5 * 2 / math.sqrt(MANY)
    assert abs((a * (b**2 - 1)).mean()) < 5 * math.sqrt(2 / MANY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_fill_the_plane(dtype):
    """Neighbours at each distance within a block, in 8 × 8 fields of equal probability."""
    x = seeded(3, (200_000, 64), dtype).double().numpy()
    fields = np.minimum((scipy.stats.norm.cdf(x) * 8).astype(int), 7)
    for first, second in ((0, 1), (0, 16), (5, 5 + 32), (16, 32), (15, 16), (0, 8), (3, 63)):
        counts = np.bincount(fields[:, first] * 8 + fields[:, second], minlength=64)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_are_independent(dtype):
    """One after the other from one seed, and those of neighbouring seeds: each number of one against each of 49 others."""
    for streams in (
        [seeded(11, (20_000,), dtype), *(standard_normal((20_000,), dtype) for _ in range(49))],
        [seeded(seed, (20_000,), dtype) for seed in range(50)],
        [cpu.standard_normal((20_000,), dtype, 2**k) for k in range(50)],
    ):
        correlation = np.corrcoef(torch.stack(streams).double().numpy())
        assert np.abs(correlation - np.eye(50)).max() < 6 / math.sqrt(20_000)


def test_samples_of_a_field_are_independent_and_have_its_covariance():
    L = bg.StencilCholesky(torch.zeros(4, 5), torch.full((4, 4, 5), -0.3), bg.Stencil.square(3))
    q = bg.GMRF(torch.zeros(4, 5), L)
    torch.manual_seed(2)
    x = q.sample((200_000,)).flatten(1).double()
    exact = q.covariance_matrix.double()
    scale = (exact.diagonal()[:, None] * exact.diagonal()).sqrt()
    error = (x.mT @ x / len(x) - exact) / scale
    assert error.abs().max() < 5 * math.sqrt(2 / len(x))
    assert ((x[1:].mT @ x[:-1] / len(x)) / scale).abs().max() < 5 / math.sqrt(len(x))


# --- seeds, states, threads, shapes ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (3, 5, 7), (2, 40_001)])
def test_the_same_numbers_for_any_number_of_threads(dtype, shape):
    torch.set_num_threads(1)
    expected = seeded(4, shape, dtype)
    assert (expected.shape, expected.dtype, expected.is_contiguous()) == (shape, dtype, True)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(seeded(4, shape, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_smaller_shape_gets_the_beginning(dtype):
    large = seeded(4, (70_000,), dtype)
    for size in (1, 15, 16, 100, 65_537):
        assert torch.equal(seeded(4, (size,), dtype), large[:size])


def test_drawing_advances_torchs_generator():
    first, second = seeded(1, (9,), torch.float32), standard_normal((9,), torch.float32)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    third = standard_normal((9,), torch.float32)
    torch.set_rng_state(state)
    assert torch.equal(standard_normal((9,), torch.float32), third)
    with torch.random.fork_rng():
        inside = standard_normal((9,), torch.float32)
    assert torch.equal(standard_normal((9,), torch.float32), inside)
    assert not torch.equal(seeded(1, (9,), torch.float32), seeded(2, (9,), torch.float32))


def test_a_generator_of_ones_own():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [standard_normal((9,), torch.float64, "cpu", torch.Generator().manual_seed(8)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(8)
    assert torch.equal(standard_normal((9,), torch.float64, generator=generator), draws[0])
    assert not torch.equal(standard_normal((9,), torch.float64, generator=generator), draws[0])


def test_no_numbers():
    assert standard_normal((0, 3), torch.float32).shape == (0, 3)


def test_memory_around_the_numbers_stays_as_it_is(monkeypatch):
    for dtype, size in itertools.product(DTYPES, (1, 17, 63, 64, 130)):
        room = torch.full((size + 128,), 9.0, dtype=dtype)
        monkeypatch.setattr(cpu, "empty", lambda shape, dtype, room=room, size=size: room[64 : 64 + size])
        cpu.standard_normal((size,), dtype, 3)
        assert (room[:64] == 9).all()
        assert (room[-64:] == 9).all()
        assert (room[64 : 64 + size] != 9).all()


# --- where torch's own numbers must come ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype):
    torch.manual_seed(0)
    expected = torch.randn(5, dtype=dtype)
    assert torch.equal(seeded(0, (5,), dtype), expected)


def test_other_backends_and_devices_are_torchs():
    torch.manual_seed(0)
    expected = torch.randn(5)
    with use_backend("reference"):
        assert torch.equal(seeded(0, (5,), torch.float32), expected)
    assert standard_normal((5,), torch.float32, "meta").is_meta


@pytest.fixture
def q():
    L = bg.StencilCholesky(torch.zeros(2, 3, 4), torch.full((2, 4, 3, 4), -0.2), bg.Stencil.square(3))
    return bg.GMRF(torch.zeros(2, 3, 4), L)


def test_vmap_asks_how_random_numbers_are_meant(q):
    def draw(loc):
        return bg.GMRF(loc, q.precision_cholesky[0], validate_args=False).rsample()

    loc = torch.zeros(3, 3, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw)(loc)
    same = torch.vmap(draw, randomness="same")(loc)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(draw, randomness="different")(loc)
    assert not torch.equal(different[0], different[1])


def test_a_compiled_sample_draws_each_time(q, keep_torch_defaults):
    draw = torch.compile(lambda shape: standard_normal(shape, torch.float32), fullgraph=True, backend="aot_eager")
    first, second = draw((3, 4)), draw((3, 4))
    assert not torch.equal(first, second)


def test_fake_tensors_and_traces_see_an_operator():
    with torch._subclasses.FakeTensorMode():
        assert isinstance(standard_normal((3, 4), torch.float32), torch._subclasses.FakeTensor)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: x + standard_normal((3,), torch.float32))(torch.zeros(3))
    assert "randn" in graph.code


def test_samples_follow_torchs_seed(q):
    torch.manual_seed(6)
    first = q.sample((5,))
    torch.manual_seed(6)
    assert torch.equal(q.sample((5,)), first)
    torch.manual_seed(6)
    assert torch.equal(q.sample((2,)), first[:2])  # alone or among others
    assert not torch.equal(q.sample((5,)), first)
    torch.manual_seed(6)
    expected = q.precision_cholesky.solve(standard_normal((5, 2, 3, 4), torch.float32), transpose=True)
    assert torch.equal(first, expected)


# --- drawn inside of a solve ---


@pytest.fixture
def drawn_inside(monkeypatch):
    """The kernels that were written for solves: whether each draws its right-hand sides."""
    written = []

    def solve(*args, normal=False, **options):
        written.append(normal)
        return cpu_solve.solve(*args, normal=normal, **options)

    monkeypatch.setitem(cpu_plan._UNROLLED, "solve", solve)
    monkeypatch.setattr(cpu_compile, "_compiled", cpu_compile._compiled.__wrapped__)
    cpu_plan.forget_plans()
    yield written
    cpu_plan.forget_plans()


def sample_and_solution(q, shape):
    """A sample of a seed, and what a solve makes of the numbers of that seed."""
    torch.manual_seed(3)
    sample = q.sample(shape)
    u = seeded(3, (*shape, *q.batch_shape, *q.event_shape), q.loc.dtype)
    return sample, q.loc + q.precision_cholesky.solve(u, transpose=True)


def a_field(dtype, batch, grid, repeated=None):
    stencil = bg.Stencil.box((1,) * len(grid))
    generator = torch.Generator().manual_seed(0)
    shapes = (*batch, *grid), (*batch, *grid), (*batch, len(stencil), *grid)
    loc, log_diag, off_diag = (0.1 * torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes)
    q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil))
    return q if repeated is None else q.expand(repeated)


WHOLE_BLOCKS = [
    ((), (64,), None, (1,)),
    ((), (5, 64), None, ()),
    ((), (5, 64), None, (3,)),
    ((), (5, 64), None, (7,)),
    ((3,), (3, 128), None, ()),
    ((3,), (3, 128), None, (5,)),
    ((3,), (3, 64), (2, 3), (2,)),
    ((1,), (3, 64), (4,), (2,)),
    ((2, 2), (2, 3, 64), None, (2,)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "grid", "repeated", "shape"), WHOLE_BLOCKS)
@pytest.mark.parametrize("threads", [1, 2])
def test_samples_drawn_inside_of_a_solve_have_the_same_bits(dtype, batch, grid, repeated, shape, threads, drawn_inside):
    torch.set_num_threads(threads)
    assert torch.equal(*sample_and_solution(a_field(dtype, batch, grid, repeated), shape))
    assert drawn_inside == [True, False]


@pytest.mark.parametrize(
    ("batch", "grid", "shape"),
    [((2,), (3, 63), (2,)), ((2,), (3, 100), ()), ((2, 1), (3, 64), (2,)), ((2,), (3, 64), (0,))],
    ids=["odd rows", "rows of other than whole blocks", "batch axes in another order", "no samples"],
)
def test_samples_that_no_solve_can_draw_are_the_same(batch, grid, shape, drawn_inside):
    assert torch.equal(*sample_and_solution(a_field(torch.float32, batch, grid), shape))
    assert True not in drawn_inside


def test_samples_that_autograd_follows_are_the_same(drawn_inside):
    q = a_field(torch.float32, (2,), (3, 64))
    torch.manual_seed(3)
    expected = q.sample()
    leaf = q.log_diag.detach().requires_grad_()
    torch.manual_seed(3)
    sample = bg.GMRF(q.loc, bg.StencilCholesky(leaf, q.off_diag, q.stencil)).rsample()
    assert torch.equal(sample, expected)
    (gradient,) = torch.autograd.grad(sample.sum(), leaf)
    assert gradient.abs().min() > 0


def test_a_sample_of_entries_that_do_not_exist_ignores_them():
    q = a_field(torch.float32, (2,), (3, 64))
    exists = q.stencil.mask(q.event_shape)
    poisoned = bg.StencilCholesky(q.log_diag, q.off_diag.where(exists, torch.nan), q.stencil)
    torch.manual_seed(3)
    expected = q.sample((2,))
    torch.manual_seed(3)
    assert torch.equal(bg.GMRF(q.loc, poisoned).sample((2,)), expected)
