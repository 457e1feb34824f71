"""Memory and time against the length of a row, on torch: one row a micro-batch, from 256 to 4,096 tokens.

python -m benchmarks.curve
"""

import argparse

from benchmarks.memory import run

WIDTHS = (256, 512, 1024, 2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{arguments.model}, {arguments.layers} layers, float32, torch on the CPU; the second of two steps\n")
    print("| tokens a row | peak memory above the weights, MB | MB a token | ms a token | estimated peak |")
    print("| --- | --- | --- | --- | --- |")
    for width in WIDTHS:
        case = {"backend": "torch", "model": arguments.model, "layers": arguments.layers, "precision": "fp32"}
        found = run(case | {"rows": 1, "width": width, "steps": 2})
        above = found["peak"] - found["parts"]["weights"]
        print(
            f"| {width} | {above / 1e6:.0f} | {above / 1e6 / width:.3f} | {1e3 * found['seconds'] / width:.2f} | "
            f"{found['predicted'] / found['peak'] - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
