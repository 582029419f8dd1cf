"""``pgchannels``: migrate, prune, demo."""


def main() -> None:
    raise SystemExit("not yet")
