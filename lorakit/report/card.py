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
    vLLM's --max-lora-rank for a form that it reads."""

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
    if str(data.get("kind", "")).startswith("hub"):
        front["datasets"] = [data["used"]]
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
    result, data = about.result, about.manifest.get("data") or {}
    if not result or about.manifest.get("imported"):
        return ""
    name = data.get("used") or about.recipe["data"]["name_or_path"]
    if data.get("kind") == "local":
        name = Path(str(name)).name
    subset = about.recipe["data"].get("subset")
    rows = data.get("train_rows")
    lines = [
        f"- data: `{name}`{f', {subset}' if subset else ''}{f', {rows:,} rows' if rows else ''}",
        f"- {result.get('steps', 0):,} steps, {result.get('tokens', 0):,} tokens,"
        f" seed {result.get('seed')}, {result.get('precision')}",
        f"- {result.get('trainable_parameters', 0):,} trained parameters",
    ]
    text = "## Training\n\n" + "\n".join(lines)
    if metrics := result.get("metrics"):
        rows_of = "\n".join(f"| {key} | {metric_value(v, '.4f')} |" for key, v in metrics.items())
        text += f"\n\nOn the validation data:\n\n| metric | value |\n|---|---|\n{rows_of}"
    return text


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
        value = plain[section].get(key)
        if value and (Path(value).is_absolute() or value.startswith((".", "~"))):
            plain[section] = {**plain[section], key: Path(value).name}
    return plain
