"""The model card, README.md, of an export: what it is, how it was trained, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.recipes.yaml_data import dump
from lorakit.report.summary import metric_value

CARD = "README.md"
# {form of an export: library of the hub that loads it}
LIBRARIES = {
    "merged": "transformers",
    "merged-gguf": "llama.cpp",
    "peft": "peft",
    "peft-portable": "peft",
    "gguf": "llama.cpp",
}
MERGED = ("merged", "merged-gguf")
# Keys of a recipe that may hold paths of the machine, which concern no reader of a card.
PLACES = (
    ("model", "name_or_path"),
    ("model", "offline"),
    ("data", "name_or_path"),
    ("data", "offline"),
    ("method", "init_from"),
)


@dataclass(frozen=True)
class Exported:
    """Facts that a model card states. recipe: resolved; result and manifest: the run's files, {}
    where there are none; base: the hub name or folder of the base, `on_hub` if it is a name; rank:
    vLLM's --max-lora-rank for a form that it reads; is_checkpoint: this is a moment before the end
    of the run, and result has its `total_steps`."""

    form: str
    name: str
    recipe: Mapping[str, Any]
    result: Mapping[str, Any]
    manifest: Mapping[str, Any]
    base: str
    on_hub: bool
    revision: str | None
    predicts_tokens: bool
    rank: int | None = None
    is_checkpoint: bool = False


def model_card(about: Exported) -> str:
    """The text of README.md."""
    base = about.base if about.on_hub else Path(about.base).name
    what = (
        f"`{base}` with a low-rank adapter merged into it"
        if about.form in MERGED
        else f"A low-rank adapter for `{base}`"
    )
    source = f", fine-tuned with the method `{about.recipe['method']['name']}` of lorakit."
    if imported := about.manifest.get("imported"):
        source = f", imported from a PEFT adapter (sha256 {imported['sha256']})."
    if about.is_checkpoint:
        step, total = about.result["steps"], about.result["total_steps"]
        source += f" This is a checkpoint: step {step:,} of a run of {total:,}."
    parts = [
        f"---\n{dump(_front_matter(about))}---",
        f"# {about.name}",
        what + source,
        _how_to_load(about, base),
        _training(about),
        _ranks(about),
        "## Recipe\n\n```yaml\n" + dump(_without_places(about.recipe)) + "```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(about: Exported) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": LIBRARIES.get(about.form, "lorakit")}
    if about.on_hub:
        front["base_model"] = about.base
        front["base_model_relation"] = "finetune" if about.form in MERGED else "adapter"
    front["pipeline_tag"] = "text-generation" if about.predicts_tokens else "text-classification"
    front["tags"] = ["lora", "lorakit", about.recipe["method"]["name"]]
    data = about.manifest.get("data") or {}
    sets = data.get("sets") or [data]
    if names := [one["used"] for one in sets if str(one.get("kind", "")).startswith("hub")]:
        front["datasets"] = list(dict.fromkeys(names))
    return front


def _how_to_load(about: Exported, base: str) -> str:
    auto = "CausalLM" if about.predicts_tokens else "SequenceClassification"
    classes = "" if about.predicts_tokens else _classes(about)
    revision = f', revision="{about.revision}"' if about.revision else ""
    load = f'AutoModelFor{auto}.from_pretrained("{base}"{classes}{revision})'
    python = f"from transformers import AutoModelFor{auto}, AutoTokenizer\n"
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
    if about.form == "merged":
        model = f'model = AutoModelFor{auto}.from_pretrained("FOLDER")\n'
        return f"## Loading\n\n```python\n{python}\n{model}{tokenizer}```"
    if about.form == "merged-gguf":
        ollama = "echo FROM ./model.gguf > Modelfile\nollama create NAME -f Modelfile"
        serve = "llama-server -m model.gguf"
        return f"## Loading\n\nllama.cpp:\n\n```\n{serve}\n```\n\nOllama:\n\n```\n{ollama}\n```"
    if about.form == "gguf":
        convert = f"python convert_hf_to_gguf.py {base} --outfile base.gguf"
        serve = "llama-server -m base.gguf --lora adapter.gguf"
        return f"## Loading\n\nllama.cpp, over the converted base:\n\n```\n{convert}\n{serve}\n```"
    if about.form not in LIBRARIES:
        return "## Loading\n\nlorakit reads this form: `lorakit generate RUN`, `lorakit eval RUN`."
    peft = f"from peft import PeftModel\n{python}\nmodel = {load}\n"
    peft += f'model = PeftModel.from_pretrained(model, "FOLDER")\n{tokenizer}'
    text = f"## Loading\n\n```python\n{peft}```"
    if about.form == "peft-portable" and about.predicts_tokens:
        rank = f" --max-lora-rank {about.rank}" if about.rank else ""
        serve = f"vllm serve {base} --enable-lora --lora-modules mine=FOLDER{rank}"
        text += (
            f"\n\nIt has one rank and one lora_alpha, so vLLM reads it too:\n\n```\n{serve}\n```"
        )
    return text


def _classes(about: Exported) -> str:
    labels = about.manifest.get("labels")
    return "" if labels is None else f", num_labels={max(1, len(labels))}"


def _training(about: Exported) -> str:
    result = about.result
    if not result or about.manifest.get("imported"):
        return ""
    recipe = about.recipe["train"]
    lines = [
        *_data_lines(about),
        f"- {result.get('steps', 0):,} steps, {result.get('tokens', 0):,} tokens,"
        f" seed {recipe['seed']}, {result.get('precision', recipe['precision'])}",
    ]
    if trained := result.get("trainable_parameters"):
        lines.append(f"- {trained:,} trained parameters")
    return "## Training\n\n" + "\n".join(lines) + _metrics_table(result)


def _data_lines(about: Exported) -> list[str]:
    """A line for each data set: its name, its rows and, of several, its share of an epoch."""
    data, recipe = about.manifest.get("data") or {}, about.recipe["data"]
    mix = recipe.get("mix") or [recipe]
    figures = {one["name"]: one for one in (about.result.get("data") or {}).get("sets", [])}
    lines = []
    for entry, one in zip(mix, data.get("sets") or [data], strict=True):
        name = one.get("used") or entry["name_or_path"]
        if one.get("kind") == "local":
            name = Path(str(name)).name
        subset, rows = entry.get("subset", recipe.get("subset")), one.get("train_rows")
        line = f"- data: `{name}`{f', {subset}' if subset else ''}"
        line += f", {rows:,} rows" if rows else ""
        share = figures.get(one.get("name"), {}).get("share_of_rows")
        lines.append(line if share is None else f"{line}, {share:.1%} of an epoch")
    return lines


def _metrics_table(result: Mapping[str, Any]) -> str:
    """The metrics, with a column for each data set of several."""
    metrics, by_set = result.get("metrics"), result.get("metrics_by_set") or {}
    if not metrics:
        return ""
    heads = ["metric", "value", *by_set]
    table = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for key in metrics:
        values = (metric_value(of.get(key), ".4f") for of in (metrics, *by_set.values()))
        table.append(f"| {' | '.join([key, *values])} |")
    return "\n\nOn the validation data:\n\n" + "\n".join(table)


def _ranks(about: Exported) -> str:
    ranks = about.result.get("ranks")
    if not ranks:
        return ""
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    rows = "\n".join(
        f"| {kind} | {len(found)} | {min(found)} | {sum(found) / len(found):.1f} | {max(found)} |"
        for kind, found in kinds.items()
    )
    head = "| layer | count | lowest rank | mean | highest |\n|---|---|---|---|---|"
    return f"## Ranks\n\n{sum(ranks.values()):,} in all.\n\n{head}\n{rows}"


def _without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without folders of the machine: of a path, the last part stays."""
    plain = {key: value for key, value in recipe.items() if key != "output_dir"}
    for section, key in PLACES:
        plain[section] = _without_folder(plain[section], key)
    if sets := plain["data"].get("mix"):
        for key in ("name_or_path", "offline"):
            sets = [_without_folder(one, key) for one in sets]
        plain["data"] = {**plain["data"], "mix": sets}
    return plain


def _without_folder(section: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = section.get(key)
    if value and (Path(value).is_absolute() or value.startswith((".", "~"))):
        return {**section, key: Path(value).name}
    return dict(section)
