"""Writes a seeded random benchmark checkpoint: `make_model.py qwen3-120m benchmarks/models/a`."""

import argparse

from jaxserve.testing import BENCH_SHAPES, DTYPES, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(BENCH_SHAPES))
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model_type, overrides = BENCH_SHAPES[args.shape]
    folder = write_checkpoint(args.out, model_type, seed=args.seed, dtype=args.dtype, **overrides)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{args.shape} ({model_type}) -> {folder}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
