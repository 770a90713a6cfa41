"""torch's dense linears, bf16 and float32: run with any Python that has torch."""

from collections.abc import Iterator

from stack import HIDDEN, INNER, SHAPES, Row, num_pairs, options, print_rows, random_inputs, stack_row, timed

BITS = {"bf16": 16, "f32": 32}


def measure(values: str, tokens: list[int], threads: int, repeats: int) -> Iterator[Row]:
    """Rows of a stack of `values`, one for each number of tokens."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if values == "bf16" else torch.float32
    pairs = num_pairs(BITS[values])
    scale = {INNER: HIDDEN**-0.5, HIDDEN: INNER**-0.5}
    weights = [
        (torch.randn(64, columns) * scale[rows]).to(dtype).repeat(rows // 64, 1)
        for _ in range(pairs)
        for rows, columns in SHAPES.values()
    ]
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    for count in tokens:
        x_TK = torch.from_numpy(random_inputs(count)).to(dtype)

        def step(x_TK: "torch.Tensor" = x_TK) -> "torch.Tensor":
            for weight in weights:
                x_TK = torch.nn.functional.linear(x_TK, weight)
            return x_TK

        with torch.inference_mode():
            seconds = timed(step, repeats)
        who = {"peer": "torch", "version": torch.__version__, "what": f"dense {values}", "threads": threads}
        yield stack_row(who, count, pairs, num_bytes, seconds)


def main() -> None:
    job = options(__doc__).parse_args()
    for values in BITS:
        print_rows(measure(values, job.tokens, job.threads, job.repeats))


if __name__ == "__main__":
    main()
