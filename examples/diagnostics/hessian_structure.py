"""Is the Hessian of a transformer as Adam-mini says? Measured on small ones, trained by `pretrain_lightning.py`.

    python examples/diagnostics/hessian_structure.py

Zhang et al. 2024, arXiv:2406.16793: the Hessian is near-block-diagonal, with a dense block per head for queries and
keys and one per output neuron for the other matrices; and Adam preconditions a block the worse, the less its diagonal
dominates. Two numbers for each claim:

* the share of |H|_F^2 of a matrix that lies within the blocks, from columns H e_i drawn at random, beside the share
  within a random partition into blocks of the same sizes;
* r = kappa(D H_b) / kappa(H_b) against tau = sum_i |h_ii| / sum_ij |h_ij| for blocks of single neurons, with
  D = 1 / sqrt(v) of the run's own AdamW, and Spearman's rank correlation; and the same for random quadratics, as in the
  paper's Figure 5.

It writes `structure.json` and pictures into OUTPUT_DIR. README.md beside this file has the results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_optim.data.presets import PRESETS, build_model
from lightning_optim.data.text import read, standard_library
from lightning_optim.data.tokenizer import encode
from lightning_optim.diagnostics import figures, hessian
from lightning_optim.diagnostics.undisturbed import frozen

EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))
from pretrain_lightning import newest  # noqa: E402

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("q_proj", "k_proj", "v_proj")
SEQUENCES, COLUMNS, ROWS, WIDTH = 4, 48, 2, 64
"""Of the measured batch; of every matrix; neurons of every matrix, and weights of each, whose block is computed."""


def train(output: Path, seed: int, steps: int) -> None:
    """A run of the example, if there is none yet."""
    flags = {"max_steps": steps, "seed": seed, "output_dir": output, "diagnostics": "off", "checkpoint_every": steps}
    command = [sys.executable, str(EXAMPLES / "pretrain_lightning.py"), "--optim", "adamw"]
    if not (output / "model" / "model.safetensors").exists():
        subprocess.run([*command, *(x for k, v in flags.items() for x in (f"--{k}", str(v)))], check=True)


def second_moments(output: Path) -> dict[str, Tensor]:
    """AdamW's v by parameter, bias-corrected."""
    checkpoint = newest(output / "version_0" / "checkpoints")
    assert checkpoint is not None
    (saved,) = torch.load(checkpoint, map_location="cpu", weights_only=False)["optimizer_states"]
    out: dict[str, Tensor] = {}
    for group in saved["param_groups"]:
        for name, key in zip(group["param_names"], group["params"], strict=True):
            state = saved["state"][key]
            out[name.removeprefix("model.")] = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    return out


def shares(matrix: Tensor, loss: Callable[[], Tensor], heads: int | None, made: torch.Generator) -> dict[str, float]:
    """Shares of |H|_F^2 of one matrix within blocks, from a sample of columns.

    Args:
        matrix: a parameter `[outputs, inputs]`.
        loss: of it.
        heads: how many blocks of rows are heads; None where rows belong to none.
        made: the sample.

    Returns:
        By partition: `head`, `neuron` (rows), and `head_random`, `neuron_random`, partitions into as many weights each.
    """
    m, n = matrix.shape
    rows = torch.arange(m)[:, None].expand(m, n).reshape(-1)
    labels = {"neuron": rows}
    if heads is not None:
        labels["head"] = rows // (m // heads)
    labels |= {f"{k}_random": x[torch.randperm(m * n, generator=made)] for k, x in labels.items()}
    full = hessian.Hessian(loss, [matrix])
    inside: defaultdict[str, float] = defaultdict(float)
    total = 0.0
    for i in torch.randperm(m * n, generator=made)[:COLUMNS].tolist():
        unit = torch.zeros(m * n, dtype=matrix.dtype)
        unit[i] = 1.0
        square = full.product([unit.view(m, n)], [0])[0].flatten().square()
        total += float(square.sum())
        for kind, label in labels.items():
            inside[kind] += float(square[label == label[i]].sum())
    return {kind: x / total for kind, x in inside.items()}


def blocks(
    matrix: Tensor, v: Tensor, loss: Callable[[], Tensor], made: torch.Generator
) -> list[tuple[float, float, float, float]]:
    """(tau, r, kappa, share of negative eigenvalues) of single neurons."""
    full, out = hessian.Hessian(loss, [matrix]), []
    for row in torch.randperm(len(matrix), generator=made)[:ROWS].tolist():
        block = hessian.exact_block(full, 0, slice(row, row + 1), slice(0, WIDTH))
        scale = v[row, :WIDTH].to(block.dtype).clamp(min=1e-30)
        numbers = (hessian.diagonal_dominance(block), hessian.conditioning_ratio(block, scale))
        negative = (torch.linalg.eigvalsh(block) < 0).double().mean()
        out.append(tuple(float(x) for x in (*numbers, hessian.condition_number(block), negative)))
    return out


def measure(model: LlamaForCausalLM, batch: Tensor, v: dict[str, Tensor] | None, seed: int) -> dict[str, Any]:
    """Shares of every matrix, by kind; and tau and r of neurons where v is known."""
    actual: dict[str, Any] = {"shares": defaultdict(list), "blocks": defaultdict(list)}
    made = torch.Generator().manual_seed(seed)
    heads = model.config.num_attention_heads

    def loss() -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    with frozen(model):
        for name, p in model.named_parameters():
            kind = name.split(".")[-2]
            if kind in KINDS:
                actual["shares"][kind].append(shares(p, loss, heads if kind in HEADS else None, made))
        model.double()  # condition numbers of 1e6 and more
        for name, p in model.named_parameters():
            kind = name.split(".")[-2]
            if kind in KINDS and v is not None:
                actual["blocks"][kind] += blocks(p, v[name], loss, made)
    return actual


def quadratics(seed: int, d: int = 50, kappa: float = 500.0, samples: int = 200) -> list[tuple[float, float]]:
    """(tau, r) of random quadratics of eigenvalues 1 to kappa, more or less rotated; v is the mean of g^2, g = H x."""
    made = torch.Generator().manual_seed(seed)
    values, out = torch.linspace(1, kappa, d, dtype=torch.float64), []
    for strength in torch.linspace(0, 0.5, 26).square().tolist():
        a = torch.randn(d, d, generator=made, dtype=torch.float64)
        q = torch.linalg.matrix_exp(strength * (a - a.mT) / 2)
        h = q @ torch.diag(values) @ q.mT
        g = h @ torch.randn(d, samples, generator=made, dtype=torch.float64) / d**0.5
        v = g.square().mean(1)
        out.append((float(hessian.diagonal_dominance(h)), float(hessian.conditioning_ratio(h, v))))
    return out


def spearman(pairs: Sequence[Sequence[float]]) -> float:
    """Rank correlation of the first two columns; there are no ties."""
    x, y = (torch.tensor([p[k] for p in pairs]).argsort().argsort().double() for k in (0, 1))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def scatter(points: dict[str, list[tuple[float, float]]], title: str) -> figures.Picture:
    """The log10 of r over tau."""
    x = sorted({p[0] for ours in points.values() for p in ours})
    nan = float("nan")
    ys = {k: [dict((p[0], p[1]) for p in ours).get(t, nan) for t in x] for k, ours in points.items()}
    return figures.curves(x, ys, title, across="tau: dominance of the diagonal", up="r", scale="log", joined=False)


def report(results: list[dict[str, Any]], output: Path) -> None:
    """Tables and pictures of all seeds."""
    text: list[str] = []
    for when in ("start", "end"):
        text += [f"{when}: share of |H|_F^2 within blocks: mean (seeds)"]
        rows = []
        for kind in KINDS:
            row = []
            for partition in ("head", "head_random", "neuron", "neuron_random"):
                seeds = [fmean(x.get(partition, float("nan")) for x in r[when]["shares"][kind]) for r in results]
                row.append(fmean(seeds))
                if partition not in results[0][when]["shares"][kind][0]:
                    continue
                text += [f"  {kind} {partition} {fmean(seeds):.3f} ({', '.join(f'{s:.3f}' for s in seeds)})"]
            rows.append(row)
        columns = ["heads", "random, as large", "neurons", "random, as large "]
        title = f"share of the Hessian's squared norm within blocks, {when} of training"
        settings: dict[str, Any] = {"across": "partition of a matrix", "unit": "share", "bounds": (0.0, 1.0)}
        picture = figures.heat_map(rows, title, rows=KINDS, columns=columns, **settings)
        Image.fromarray(picture).save(output / f"blocks_{when}.png", optimize=True)
    points = {k: [b for r in results for b in r["end"]["blocks"][k]] for k in KINDS}
    everything = [b for ours in points.values() for b in ours]
    for k, ours in [*points.items(), ("all", everything)]:
        means = [sum(p[i] for p in ours) / len(ours) for i in (0, 3)]
        helped = sum(p[1] < 1 for p in ours) / len(ours)
        kappa, r = (sorted(p[i] for p in ours)[len(ours) // 2] for i in (2, 1))
        text += [
            f"{k}: {len(ours)} neurons, tau {means[0]:.3f}, median kappa {kappa:.3g}, median r {r:.3g}, "
            f"r < 1 in {helped:.0%}, {means[1]:.0%} negative eigenvalues, rank correlation {spearman(ours):.2f}"
        ]
    each = [spearman([b for ours in r["end"]["blocks"].values() for b in ours]) for r in results]
    text += [f"rank correlation of r and tau by seed: {', '.join(f'{x:.2f}' for x in each)}"]
    title = "Adam's effect on the condition number, single neurons of trained models"
    Image.fromarray(scatter({k: [p[:2] for p in ours] for k, ours in points.items()}, title)).save(output / "r_tau.png")
    synthetic = {f"seed {r['seed']}": quadratics(r["seed"]) for r in results}
    ours = ", ".join(f"{spearman(x):.2f}" for x in synthetic.values())
    text += [f"random quadratics: rank correlation by seed {ours}"]
    title = "Adam's effect on the condition number, random quadratics (d = 50, kappa = 500)"
    Image.fromarray(scatter(synthetic, title)).save(output / "r_tau_quadratics.png")
    (output / "structure.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))


def main() -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/structure"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        output = args.output_dir / str(seed)
        if (output / "structure.json").exists():
            continue
        train(output, seed, args.steps)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "model")
        preset = PRESETS["tiny"]
        batch = encode(tokenizer, read(standard_library("validation"))[:8], preset.context)[:SEQUENCES]
        torch.manual_seed(seed)
        start = measure(build_model(len(tokenizer), preset), batch, None, seed)
        end = measure(LlamaForCausalLM.from_pretrained(output / "model"), batch, second_moments(output), seed)
        actual = {"seed": seed, "start": start, "end": end}
        (output / "structure.json").write_text(json.dumps(actual))
    actual = sorted(args.output_dir.glob("*/structure.json"))
    report([json.loads(path.read_text()) for path in actual], args.output_dir)


if __name__ == "__main__":
    main()
