#!/usr/bin/env python
"""Check of every architecture of transformers, as a tiny random model: lorakit's loss must equal
the loss of the exported adapter in PEFT and of the merged model in plain transformers, or the
recipe must be refused with a message.

    python scripts/check_architectures.py                 all of them, some minutes
    python scripts/check_architectures.py llama t5        some
    python scripts/check_architectures.py --json out.json

Configurations that can not be made tiny by changing their sizes are skipped, with the reason. The
exit code is 1 if a loss differs or a command fails without a message.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from rich.console import Console
from rich.table import Table

from tests.support.architectures import AUTO, TASKS, compared, tiny_config

LARGE = 3_000_000  # most parameters of a tiny model, which those with image or sound parts exceed
EXACT = 1e-4


def check(kind: str, task: str) -> dict[str, str]:
    """Check one architecture; returns {"result": word, "detail": …}."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AUTO[task].from_config(tiny_config(kind)).parameters())
    except Exception as error:  # each configuration validates itself and raises its own types
        return {"result": "left out", "detail": f"{type(error).__name__}: {error}"}
    if size > LARGE:
        return {"result": "left out", "detail": f"{size:,} parameters"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = compared(kind, task, Path(folder))
        except AssertionError as error:
            return {"result": "FAILED", "detail": str(error)}
        except Exception as error:  # in transformers or PEFT
            return {"result": "fails elsewhere", "detail": f"{type(error).__name__}: {error}"}
    if found.refused:
        return {"result": "refused", "detail": found.refused[found.refused.find("error:") :]}
    peft = 0.0 if found.not_for_peft else abs(found.peft - found.lorakit)
    merged = abs(found.merged - found.lorakit)
    detail = f"loss {found.lorakit:.5f}, base {found.base:.5f}, merged {merged:.0e}, PEFT " + (
        "does not load it" if found.not_for_peft else f"{peft:.0e}"
    )
    if max(peft, merged) <= EXACT:
        return {"result": "same", "detail": detail}
    said = "PEFT may not load" in found.log and merged <= EXACT
    return {"result": "said" if said else "DIFFERS", "detail": detail}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for task in TASKS:
        # the only list of architectures in transformers
        known = sorted(config.model_type for config in AUTO[task]._model_mapping)
        for kind in known:
            if not options.kinds or kind in options.kinds:
                rows.append({"task": task, "model_type": kind} | check(kind, task))
                print(
                    *(str(value)[:90] for value in rows[-1].values()), file=sys.stderr, flush=True
                )
    table = Table("task", "result", "number", "architectures")
    for task in TASKS:
        for result in sorted({row["result"] for row in rows}):
            kinds = [
                row["model_type"] for row in rows if (row["task"], row["result"]) == (task, result)
            ]
            table.add_row(task, result, str(len(kinds)), " ".join(kinds))
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    sys.exit(any(row["result"] in ("FAILED", "DIFFERS") for row in rows))


if __name__ == "__main__":
    main()
