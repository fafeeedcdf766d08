"""What the command-line programs `bench` and `experiments` have in common: how commands end, folders, tables, the machine."""
