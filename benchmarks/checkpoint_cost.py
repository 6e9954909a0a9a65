"""What checkpoints cost, as a share of the time of training at the default settings: a line of docs/faults.md.

python benchmarks/checkpoint_cost.py DATA
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
EPOCHS = 4


def main(data: str) -> None:
    from mnist_lit.cli.config import settings
    from mnist_lit.train import train
    from mnist_lit.training.checkpoints import Checkpoints

    seconds: list[float] = []
    save = Checkpoints._save_last

    def timed(self: Checkpoints, trainer: Any) -> None:
        started = time.perf_counter()
        save(self, trainer)
        seconds.append(time.perf_counter() - started)

    Checkpoints._save_last = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=ROOT / "outputs") as folder:
        run = settings("train", f"data.dir={data}", "data.source=mnist", f"trainer.max_epochs={EPOCHS}")
        results = train(folder, **run)
        size = (Path(folder) / "checkpoints" / "last.ckpt").stat().st_size
    each, epoch = statistics.median(seconds), statistics.median(results["epoch_seconds"])
    line = (
        f"{len(seconds)} checkpoints of {size / 1e6:.1f} MB in {EPOCHS} epochs of the full MNIST on "
        f"{results['device']}: {1e3 * each:.0f} ms each (median; longest {1e3 * max(seconds):.0f}), "
        f"{100 * sum(seconds) / results['fit_seconds']:.2f} % of the time of training (an epoch takes {epoch:.1f} s)."
    )
    path = ROOT / "docs" / "faults.md"
    head, mark, _ = path.read_text(encoding="utf-8").partition("writes this line.\n")
    path.write_text(f"{head}{mark}\n{line}\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).absolute()))
