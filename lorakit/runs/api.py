"""Use of lorakit from Python: train, and open a run to generate, evaluate or export.

Errors are LorakitErrors, whose text is the block that the command line shows. Nothing is printed:
messages go to `logging.getLogger("lorakit")`. The process keeps its own settings
(`lorakit.process`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from lorakit import compat
from lorakit.errors import Interrupted, UsageError
from lorakit.files import expanded
from lorakit.inference.generator import GenerationSettings, Generator
from lorakit.models.load import compute_dtype, default_device
from lorakit.recipes.recipe import Recipe, load_recipe, recipe_of
from lorakit.report.logged import logged_progress
from lorakit.runs.chat import Chat
from lorakit.runs.evaluate import evaluate_run
from lorakit.runs.export import export_folder, export_run
from lorakit.runs.generate import check_writes, write_with
from lorakit.runs.moment import chosen, result_of
from lorakit.runs.predict import Prediction, Text, check_predicts, predict_texts, texts_of
from lorakit.runs.push import Destination
from lorakit.runs.saved import saved_model, saved_recipe
from lorakit.runs.train import run_training
from lorakit.training.interrupt import Stopped

log = logging.getLogger("lorakit")
Texts = list[str]
# {form of Run.export for a whole model: its --format}
MERGED = {"merged": None, "merged-gguf": "gguf"}


class Run:
    """A run, finished or at a checkpoint. Its model is loaded on first use."""

    def __init__(self, folder: Path | str) -> None:
        """folder: of a run, or of one of its checkpoints; of a run that is not finished, the newest
        is taken. Raises UsageError for other folders, and for a run that has saved nothing."""
        self.folder = chosen(expanded(folder))
        self.recipe = saved_recipe(self.folder)
        self.result: dict[str, Any] = result_of(self.folder)
        """The content of result.json; of a checkpoint, the entries that it tells."""
        if not self.result:
            what = f"the run `{self.folder}` is not finished"
            raise UsageError(what, 'Go on with it by train(recipe, resume="auto").')

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"<lorakit run {self.folder}: {shown}>"

    @property
    def metrics(self) -> dict[str, float]:
        """{name: value} on the validation rows; {} for a checkpoint that was not evaluated."""
        return dict(self.result["metrics"])

    @property
    def ranks(self) -> dict[str, int]:
        """{module: rank of its adapter}."""
        return dict(self.result["ranks"])

    @cached_property
    def _opened(self) -> Any:
        dtype = compute_dtype(self.recipe.train.precision, default_device())
        return saved_model(self.folder, self.recipe, dtype)

    @property
    def model(self) -> Any:
        """The transformers model with the trained adapters in it, in evaluation mode."""
        return self._opened[0].model

    @property
    def tokenizer(self) -> Any:
        return self._opened[0].tokenizer

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self._opened[0], self._opened[1])

    @overload
    def generate(
        self, prompt: str, *, chat: bool = ..., system: str | None = ..., **settings: Any
    ) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, chat: bool = ..., system: str | None = ..., **settings: Any
    ) -> Texts: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        chat: bool = False,
        system: str | None = None,
        **settings: Any,
    ) -> str | Texts:
        """The continuation of a prompt, or one for each of several.

        chat: each prompt is the question of a conversation of its own, after the message `system`;
        settings: fields of GenerationSettings (max_new_tokens, temperature, top_k, top_p, seed,
        stop). Raises UsageError for a classifier, and for settings or prompts that do not fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_writes(self.folder, self.recipe)
        stop = tuple(settings.pop("stop", ()))
        chosen = GenerationSettings(**settings, stop=stop, batch_size=len(prompts))
        groups = [[one] for one in prompts] if chat else [prompts]
        written = [
            one
            for group in groups
            for one in write_with(
                self._generator, self.recipe, group, chosen, Chat(system) if chat else None
            )
        ]
        texts = [one.generated.text for one in written]
        return texts[0] if isinstance(prompt, str) else texts

    def predict(self, texts: Text | Sequence[Text]) -> list[Prediction]:
        """The classes with their probabilities, or the value, of a text, or of each of several. A
        text of a run on pairs is a pair (text, text). Raises UsageError for a run that writes
        text, and for texts that do not fit."""
        check_predicts(self.folder, self.recipe)
        count = texts_of(self.folder)
        alone = isinstance(texts, str) or (count == 2 and isinstance(texts, tuple))
        rows: list[Any] = [texts] if alone else list(texts)
        return predict_texts(self._opened, self.recipe, rows, count, logged_progress())

    def evaluate(self, *overrides: str) -> dict[str, float]:
        """{metric: value} on the run's validation rows, or on other data: overrides are those of
        `lorakit eval`, such as "data.name_or_path=other.jsonl". Loads a model of its own."""
        metrics = evaluate_run(self.folder, overrides, logged_progress())["metrics"]
        return dict(metrics)

    def export(
        self,
        form: str = "merged",
        *,
        out: Path | str | None = None,
        dtype: str | None = None,
        force: bool = False,
        push_to_hub: str | None = None,
        private: bool = True,
        revision: str | None = None,
    ) -> Path:
        """Write the run in another form; returns the folder. form: `merged` (a whole model),
        `merged-gguf` (the same as one file for llama.cpp) or, for the adapter alone, `lorakit`,
        `peft`, `peft-portable`, `gguf` or `sparse`. force: replace an existing target.
        push_to_hub: OWNER/NAME of a repository that the finished export is sent to, made `private`
        if it is not there; revision: its branch.

        Raises UsageError before anything is written, and RunError if it can not be sent.
        """
        to = Destination(push_to_hub, private, revision) if push_to_hub else None
        merge = form in MERGED
        kind = MERGED.get(form, form)
        target = export_folder(self.folder, merge, kind) if out is None else expanded(out)
        lines = export_run(
            self.folder,
            merge=merge,
            adapter=not merge,
            form=kind,
            dtype=dtype,
            out=target,
            force=force,
            to=to,
        )
        for line in lines:
            log.info("%s", line)
        return target


def train(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *overrides: str,
    resume: str | None = None,
    overwrite: bool = False,
) -> Run:
    """Train as a recipe says (its file, a mapping like the file's content, or a loaded one), and
    open the run. overrides: `key=value` for recipe keys; resume, overwrite: as of `lorakit train`.

    Raises RecipeError or UsageError before anything is written, RunError when the run fails, and
    KeyboardInterrupt when it is interrupted. If training had begun, a checkpoint is saved first,
    and resume="auto" continues from it. Signals are handled in the main thread only, since Python
    delivers them only there.
    """
    loaded = _recipe(recipe, overrides)
    compiling = compat.sizes_restored() if loaded.train.torch_compile else nullcontext()
    progress = logged_progress(loaded.train.logging_steps)
    try:
        with compiling:
            run_training(loaded, progress, resume, overwrite)
    except (Interrupted, Stopped) as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped
    return Run(loaded.output_dir)


def load_run(folder: Path | str) -> Run:
    """The run in a folder, or at one of its checkpoints. Raises UsageError if there is none."""
    return Run(folder)


def _recipe(recipe: Recipe | Mapping[str, Any] | Path | str, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Mapping):
        return recipe_of(recipe, overrides)
    if not isinstance(recipe, Recipe):
        return load_recipe(expanded(recipe), overrides)
    if overrides:
        raise UsageError("a loaded recipe takes no overrides", "Give them to load_recipe.")
    return recipe
