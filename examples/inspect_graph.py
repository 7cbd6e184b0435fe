"""See what qcompile does to a model: what it quantizes, why not the rest, and the program after each pass.

python examples/inspect_graph.py
"""

import torch
from torch import nn

import qcompile


class Block(nn.Module):
    """A residual feed-forward block with a head, spelled as anybody might."""

    def __init__(self, width: int = 256, vocabulary: int = 512) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.lm_head(x)


def main() -> None:
    model = Block()
    x = torch.randn(8, 64, 256)

    report = qcompile.explain(model, x)  # what torch.compile(model, backend="qcompile_fp4")(x) would do
    print(report)

    options = {"skip": ["lm_head", "down"], "gradient": "fp8"}  # the options of torch.compile
    print(qcompile.explain(model, x, options=options))

    print("programs:", *report.programs, sep="\n  ")
    name, program = list(report.programs.items())[-1]
    print(f"\n--- {name}\n{program}")


if __name__ == "__main__":
    main()
