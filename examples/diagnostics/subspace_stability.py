"""How stable is the eigenbasis of a real `soap` run? Figure 6 of the Alice paper, from the run's own log.

    python examples/diagnostics/subspace_stability.py

Gong et al. 2025, arXiv:2502.07752, Fig. 6: cosines between the leading eigenvectors before and after 200 steps, index
by index; the first stay, those further down turn. Here the basis is SOAP's, as `GradientRank` logs it in a run of
`pretrain_lightning.py --optim soap --diagnostics matrix`: |u_i^T v_i| of the 32 leading columns, and beside it the
overlap of the spans, since columns of close eigenvalues pair wrongly. It writes `cosines.png`, `overlap.png` and prints
the means.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_optim.diagnostics import figures

EXAMPLES = Path(__file__).parents[1]


def main() -> None:
    """Train, read the arrays, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/stability"))
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    log = args.output_dir / "version_0" / "diagnostics"
    if not log.exists():
        flags = {"optim": "soap", "max_steps": args.steps, "diagnostics": "matrix", "output_dir": args.output_dir}
        command = [sys.executable, str(EXAMPLES / "pretrain_lightning.py")]
        subprocess.run([*command, *(x for k, v in flags.items() for x in (f"--{k}", str(v)))], check=True)

    steps, cosines, overlaps = [], [], []
    for path in sorted(log.glob("rank-*.npz")):
        with np.load(path) as arrays:
            table, columns = arrays["values"], [str(c) for c in arrays["columns"]]
        names = table[~np.isnan(table[:, columns.index("cosine@1")])]
        if len(names):
            steps.append(int(path.stem.split("-")[1]) + 1)
            cosines.append([np.nanmean(names[:, i]) for i, c in enumerate(columns) if c.startswith("cosine@")])
            overlaps.append(names[:, columns.index("overlap")])
    title = f"SOAP: |cosine| of an eigenvector with itself one measurement before, mean of {len(overlaps[0])} matrices"
    picture = figures.heat_map(
        np.array(cosines).T,
        title,
        rows=[str(i) for i in range(1, len(cosines[0]) + 1)],
        columns=[str(s) for s in steps],
        across="optimizer step (rows: eigenvectors by eigenvalue)",
        unit="|cosine|",
        bounds=(0.0, 1.0),
    )
    Image.fromarray(picture).save(args.output_dir / "cosines.png", optimize=True)
    lines = {"mean": [x.mean() for x in overlaps], "least": [x.min() for x in overlaps]}
    lines["most"] = [x.max() for x in overlaps]
    picture = figures.curves(
        steps,
        lines,
        "SOAP: overlap of the leading 32 eigenvectors' span with the measurement before",
        across="optimizer step",
        up="chance-adjusted overlap (0: unrelated, 1: the same)",
    )
    Image.fromarray(picture).save(args.output_dir / "overlap.png", optimize=True)
    print("steps since the measurement before:", np.diff(steps).tolist())
    for name, part in (("1", slice(1)), ("2-4", slice(1, 4)), ("5-16", slice(4, 16)), ("17-32", slice(16, 32))):
        print(f"eigenvectors {name}: mean |cosine|", [f"{np.mean(c[part]):.2f}" for c in cosines])
    print("overlap of the spans, mean:", [f"{x:.2f}" for x in lines["mean"]])


if __name__ == "__main__":
    main()
