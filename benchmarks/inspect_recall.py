"""A page of `dualroute inspect` on a model that finds a passkey, and a picture of it.

    python benchmarks/inspect_recall.py --output passkey.html [--image passkey.png]

Trains the routed model of `recall.py` (2 layers, texts of 512 tokens, blocks of 32, two chosen blocks) for a
few minutes and looks at one fresh text: at the mark behind which the digits are asked for, the page shows the
block that holds them. The picture is taken by a headless Chromium, if there is one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import recall
import torch

from dualroute.evaluate.inspect.numbers import Inspection, inspect_ids
from dualroute.evaluate.inspect.page import page

LENGTH, BLOCK, DIGITS = 512, 32, 4
OPTIONS = {
    "task": "passkey", "length": LENGTH, "start": 128, "evaluate": [], "min_distance": 128, "steps": 200,
    "patience": 2500, "tokens": 8192, "batches": 4, "lr": 3e-3, "dim": 64, "layers": 2, "heads": 4,
    "window": 32, "block": BLOCK, "sub_block": 8, "top_k": 2, "theta": 1e6, "verbose": True,
}  # fmt: skip


def spelled(number: int) -> str:
    """How an id is shown: digits as hexadecimal ones, filler as small letters, the mark as KEY."""
    if number == recall.MARK:
        return " KEY "
    if number < recall.KEYS:
        return f"{number:X}"
    return chr(ord("a") + (number - recall.KEYS) % recall.FILLER)


def look(model: torch.nn.Module, seed: int) -> tuple[Inspection, int, int]:
    """The numbers of one text, where its passkey begins, and where it is asked for."""
    ids, labels = recall.passkey(1, LENGTH, 128, torch.Generator().manual_seed(seed))
    numbers = ids[0].tolist()
    found = inspect_ids(model, numbers, [spelled(number) for number in numbers])
    place, asked = numbers.index(recall.MARK), LENGTH - DIGITS - 1
    answers = model.eval()(ids)[0].argmax(-1)
    right = bool((answers == labels[0])[labels[0] != -100].all())
    found.notes.append(
        f"A passkey of {DIGITS} digits stands in block {place // BLOCK}, and is asked for at token {asked}; "
        f"the model answers {'right' if right else 'wrong'}."
    )
    return found, place, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--weights", type=Path, help="read the trained weights here, or write them")
    parser.add_argument("--seed", type=int, default=5, help="of the text that is looked at")
    options = parser.parse_args()
    settings = argparse.Namespace(**OPTIONS)
    if options.weights is not None and options.weights.exists():
        model = recall.build(settings, "routed", 0)
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        model, seconds = recall.train(settings, "routed", 0, torch.device("cpu"))
        print(f"trained for {seconds:.0f} s")
        if options.weights is not None:
            torch.save(model.state_dict(), options.weights)
    print(f"right answers: {recall.accuracy(settings, model.eval(), LENGTH, torch.device('cpu')):.3f}")
    found, place, asked = look(model, options.seed)
    for number, layer in enumerate(found.layers):
        weights = layer.block_weights[:, asked]  # (H_g, nb)
        for head, row in enumerate(weights):
            best = int(row.argmax())
            print(
                f"layer {number} global head {head} at token {asked}: block {best} has {row[best]:.3f} "
                f"(the passkey is in block {place // BLOCK})"
            )
    for row in sorted(range(len(found.ablations)), key=lambda a: -found.kl[a, asked])[:6]:
        print(f"off {found.ablations[row].name}: KL {found.kl[row, asked]:.3f} at token {asked}")
    options.output.write_text(page(found, "a passkey among 512 tokens"))
    if options.image is not None:
        of_key = [layer.block_weights[:, asked, place // BLOCK].max() for layer in found.layers]
        best = of_key.index(max(of_key))
        picture(options.output, options.image, asked, best)


def picture(html: Path, image: Path, token: int, layer: int) -> None:
    """A picture of the page with a token pointed at."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium here: open the page in a browser")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
                "--hide-scrollbars", "--window-size=1240,1080", f"--screenshot={image.resolve()}",
                f"{html.resolve().as_uri()}#layer={layer}&token={token}",
            ],
            check=True, capture_output=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
