"""Models: how one is loaded, which parts are trained in full, and what a batch's loss is."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lorakit import compat
from lorakit.data.examples import IGNORED, Batch, Examples, collate
from lorakit.data.labels import Labels, Task
from lorakit.errors import RecipeError, RunError
from lorakit.kernels import levels
from lorakit.kernels.attention import use_attention
from lorakit.kernels.cross_entropy import linear_cross_entropy
from lorakit.kernels.elementwise import use_fast_elementwise
from lorakit.kernels.levels import Level
from lorakit.kernels.packing import Packing, using
from lorakit.kernels.rotary import use_fast_rotary
from lorakit.sources import Source, model_folder
from lorakit.spec import Spec
from lorakit.storage import read_json, sha256, write_json
from lorakit.trial import position_limit, weightless

log = logging.getLogger("lorakit")
HTTPError = compat.http_error()
AUTO_CLASS = {"sequence-classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}
LONGEST_DEFAULT = 1024
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a tokenizer consists of, beside the vocabulary files that its class names.
TOKENIZER_FILES = {"tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.model"}
TOKENIZER_FILES |= {"chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"}
# What transformers 5 calls a class that files of transformers 4 name.
CLASS_NAMES = {"PreTrainedTokenizerFast": "TokenizersBackend"}
# Three token ids, to try whether the class is read at another place where the last of two tokens is the pad token.
TRIED = (1, 2, 3)
LARGE = 50_000_000  # parameters from which on compiled products are kept in small numbers
# Keys of a configuration that tell how many positions there are.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Keys of a configuration that bound how far a token attends.
LOCAL_ATTENTION = ("sliding_window", "attention_chunk_size", "local_attention")


class ModelSpec(Spec):
    """Which model to adapt, and for what."""

    name_or_path: str
    """A model on the hub, `builtin/…`, or a local folder."""
    task: Task
    """What the model is trained for."""
    offline: str | None = None
    """What to use instead when, and only when, the hub can not be reached: `builtin/…` or a local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


@dataclass
class TaskModel:
    """A model with its tokenizer and task. `heads` are the modules trained in full, in float32. new_cache: the key-value cache
    that a pass without gradients goes through, or None, where what it keeps is not exact. reads_at_pad: whether the class is read
    at the last token that is not the pad token (`reads_at_pad_token`); base_pad_id: the pad token of the base's configuration.
    packs: whether rows go through the blocks without padding; pads_to_train: not where gradients are wanted; compiles: whether
    products are compiled for each number of tokens (lorakit.engine)."""

    model: Any  # transformers has no type that has both the module's and the config's attributes
    tokenizer: Any
    task: Task
    heads: list[str]
    new_cache: Callable[[], Any] = field(default=lambda: None)
    reads_at_pad: bool = False
    base_pad_id: int | None = None
    packs: bool = False
    pads_to_train: bool = False
    compiles: bool = True

    @cached_property
    def pad_id(self) -> int:
        """The token id that rows are padded with: the model's own pad token, the tokenizer's, or another that has an embedding.

        The tokenizer itself is never changed: what it says about padding is the base's own, and is exported.
        """
        config = self.model.config.get_text_config()
        return _with_embedding(self.model, [getattr(config, "pad_token_id", None), *_fillers(self.tokenizer)])

    def ends(self, own: bool = False) -> set[int]:
        """Tokens that end a generated text: those of the base's settings of generation and, unless `own`, the tokenizer's, in
        which completions are trained to end."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        found = named if isinstance(named, list) else [named]
        return {token for token in [*found, None if own else self.tokenizer.eos_token_id] if token is not None}

    @cached_property
    def bare_head(self) -> bool:
        """Whether the token logits are nothing but the output embedding of the last hidden states.

        Found out by trying: some architectures scale or cap their logits (Gemma 2, Granite, Cohere).
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return False
        ids = torch.arange(1, 9, device=self.device)[None] % self.model.config.get_text_config().vocab_size
        mode = self.model.training
        self.model.eval()
        with torch.no_grad():
            # A model without a body of its own (Llama 4's text part) is its own base model, and gives logits.
            hidden = getattr(self.model.base_model(ids, use_cache=False), "last_hidden_state", None)
            same = hidden is not None and torch.equal(head(hidden), self.model(ids, use_cache=False).logits)
        self.model.train(mode)
        return same

    def _target_losses(self, batch: Batch, present: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target [targets], from the positions before them alone where the architecture allows."""
        if not self.bare_head:
            return cross_entropy(self.logits(batch)[:, :-1][present].float(), targets, reduction="none")
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} | self._cached(self.model.base_model)
        with using(self._packing(batch)):
            hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1][present]
        head = self.model.get_output_embeddings()
        frozen = type(head) is nn.Linear and not head.weight.requires_grad and head.weight.dtype == hidden.dtype
        if not frozen or hidden.device.type != "cpu":  # elsewhere its many small products would cost more than they save
            return cross_entropy(head(hidden).float(), targets, reduction="none")
        return linear_cross_entropy(hidden, head.weight, head.bias, targets)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def logits(self, batch: Batch) -> Tensor:
        """Class logits [rows, classes], or token logits [rows, longest, vocabulary]."""
        if self._class_token is not None:
            # A batch is refused whose rows have different numbers of it, as they do where a text spells the token out.
            ends = (batch.input_ids == self._class_token).sum(1)
            if len(counts := torch.unique(ends)) > 1:
                groups = [(ends == count).nonzero().squeeze(1) for count in counts]
                order = torch.cat(groups).argsort()
                return torch.cat([self.logits(batch.select(rows)) for rows in groups])[order]
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        # The model's own pass, heads included: where a decoder reads its class is its own rule, here as in plain transformers.
        with using(self._packing(batch)):
            logits: Tensor = self.model(**(inputs | self._cached(self.model))).logits
        return logits

    @cached_property
    def _class_token(self) -> int | None:
        """The token whose last place in a row the class is read at: the end of the sequence for BART, T5 and their kin."""
        config = getattr(self.model, "config", None)
        if self.task != "sequence-classification" or not getattr(config, "is_encoder_decoder", False):
            return None
        end = config.eos_token_id  # type: ignore[union-attr]
        return end if isinstance(end, int) else None

    def _packing(self, batch: Batch) -> Packing | None:
        """How the rows of a batch are packed; None where they stay padded, as they must for a cache."""
        longest = batch.input_ids.shape[1]
        if longest > self.longest_packed:
            return None
        return Packing(batch.lengths.tolist(), longest, self.device, self.compiles)

    @property
    def longest_packed(self) -> float:
        """Tokens of the longest row that is packed, with or without gradients as they are now; 0 where none is."""
        if not self.packs or (self.pads_to_train if torch.is_grad_enabled() else self.new_cache() is not None):
            return 0
        return self._shortest_window

    @cached_property
    def _shortest_window(self) -> float:
        """What limits how far a token sees, in some layer, is not known inside: longer rows can not be packed."""
        config = self.model.config.get_text_config()
        limits = (getattr(config, name, None) for name in LOCAL_ATTENTION)
        return min((limit for limit in limits if isinstance(limit, int)), default=math.inf)

    def _cached(self, module: Any) -> dict[str, Any]:
        """How a pass of the model or of its body uses a key-value cache: not at all, unless what it writes depends on it."""
        if self.task != "causal-lm":
            return {}
        cache = None if torch.is_grad_enabled() else self.new_cache()
        if cache is None:
            return {"use_cache": False}
        # Rows are padded on the right, where nothing that comes before can see it: no mask is needed, and a cache keeps none.
        return {"use_cache": True, "attention_mask": None} | compat.cache_argument(module, cache)

    def run_body(self, batch: Batch) -> None:
        """A pass through the model without its head, for those who watch its layers."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        self.model.base_model(**inputs, **({"use_cache": False} if self.task == "causal-lm" else {}))

    def row_losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(loss of each row, summed over its targets [rows]; class logits, or None for causal-lm). In float32."""
        if self.task == "causal-lm":
            targets = batch.labels[:, 1:]
            present = targets != IGNORED
            losses = torch.zeros(targets.shape, device=targets.device)
            losses[present] = self._target_losses(batch, present, targets[present])
            return losses.sum(1), None
        logits = self.logits(batch)
        if batch.labels.is_floating_point():
            return mse_loss(logits.float().squeeze(-1), batch.labels, reduction="none"), logits
        return cross_entropy(logits.float(), batch.labels, reduction="none"), logits


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """The type of base and activations. auto: bf16 where the device multiplies in it natively, else float32.

    A processor does from the level avx512 on (`lorakit.kernels.levels`). Raises UsageError for a level that it lacks."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = levels.precision_level() >= Level.avx512
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(source: Source, spec: ModelSpec) -> Any:
    """The model's tokenizer as it is; `name_or_path` is the folder that holds its files."""
    with _loading(source, spec):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **_origin(source, spec))
    folder = model_folder(source, spec.revision)
    if folder is not None:
        tokenizer.name_or_path = str(folder)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Tokenizer and chat template into `folder`: the very files that the tokenizer was loaded from, where they are at hand.

    transformers' own saving drops settings that the tokenizer's class does not know and writes the state of the last call, so it
    only makes what the files lack. In a folder without a model's configuration, by which transformers may choose another class
    than the files name, the class is the one that was chosen for the base.
    """
    if tokenizer.is_fast:
        compat.backend(tokenizer).no_padding()
        compat.backend(tokenizer).no_truncation()
    tokenizer.save_pretrained(folder)
    origin = Path(tokenizer.name_or_path or os.devnull)
    if not origin.is_dir():
        return
    written = read_json(folder / TOKENIZER_CONFIG)
    names = TOKENIZER_FILES.union(tokenizer.vocab_files_names.values())
    for file in sorted(file for name in names for file in origin.glob(name) if file.is_file()):
        copy = folder / file.relative_to(origin)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    settings, chosen = read_json(folder / TOKENIZER_CONFIG), written["tokenizer_class"]
    named = settings.get("tokenizer_class", "")
    same = chosen in (named, named.removesuffix("Fast"), CLASS_NAMES.get(named))
    if not same and not (folder / "config.json").exists():
        write_json(folder / TOKENIZER_CONFIG, settings | {"tokenizer_class": chosen})


def load_config(source: Source, spec: ModelSpec) -> Any:
    """The model's configuration; raises RecipeError when it has none, or one of an unknown architecture."""
    with _loading(source, spec):
        return AutoConfig.from_pretrained(source.location, **_origin(source, spec))


def load_model(
    source: Source, spec: ModelSpec, tokenizer: Any, labels: Labels | None, dtype: torch.dtype | str, config: Any = None
) -> tuple[TaskModel, list[str]]:
    """The pretrained model with a head for `labels`, and notes for the log. `dtype` "auto" is the checkpoint's own.

    config: the base's own, where it was read already; it is left as it is.

    The checkpoint's head is taken only if it is one for these labels (`fit_head`).

    Only safetensors are read: pickled weights are refused. Raises RecipeError or RunError.
    """
    base = load_config(source, spec) if config is None else config
    settings = {"config": with_labels(base, labels), "ignore_mismatched_sizes": labels is not None}
    with _loading(source, spec):
        model, report = AUTO_CLASS[spec.task].from_pretrained(
            source.location, dtype=dtype, use_safetensors=True, output_loading_info=True, **_origin(source, spec), **settings
        )
    use_kernels(model)
    heads = head_names(model, spec.task)
    notes = []
    missing = [name for name in report["missing_keys"] if not name.startswith(tuple(heads))]
    if missing:
        notes.append(f"{len(missing)} weights are not in the checkpoint and start at random: {', '.join(sorted(missing)[:3])} …")
    if report["mismatched_keys"]:
        notes.append(
            f"the checkpoint's head has another shape than {labels.count if labels else 0} labels need: a new one is trained"
        )
    if labels is not None and not fit_head(labels, base)[1]:
        _start_head(model, heads, labels.count)
    task_model = TaskModel(model, tokenizer, spec.task, heads)
    if spec.task == "sequence-classification" and reads_at_pad_token(model):
        task_model.reads_at_pad, task_model.base_pad_id = True, model.config.get_text_config().pad_token_id
        # Whoever pads a batch does it with the tokenizer's pad token, so that is the one to look for.
        first, *others = _fillers(tokenizer)
        _set_pad_token(model, _with_embedding(model, [first, task_model.base_pad_id, *others]))
    return task_model, notes


def check_model(task_model: TaskModel, examples: Examples) -> None:
    """Try the model on two short rows of the examples. Raises RecipeError where it can not read them, or where the tokens of a
    causal-lm see those that come after them, which they are to predict."""
    model, name = task_model.model, type(task_model.model).__name__
    lengths = examples.lengths
    shortest = int(lengths.argmin())
    longer = int(np.where(lengths > lengths[shortest], lengths, np.iinfo(lengths.dtype).max).argmin())
    batch = collate(examples, np.array([longer, shortest]), task_model.pad_id).to(task_model.device)
    last = int(lengths[longer]) - 1
    changed = replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[0, last] = batch.input_ids[0, 0] + (batch.input_ids[0, 0] == batch.input_ids[0, last]).long()
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = task_model.logits(batch).float()
            after = task_model.logits(changed).float() if task_model.task == "causal-lm" else logits
    except Exception as error:  # whatever a model raises that can not do with token ids and a mask
        reason = next(iter(str(error).strip().splitlines()), "")
        what = f"{name} can not read rows of different lengths: {type(error).__name__}: {reason}"
        raise RecipeError.at("model.name_or_path", what, "a model that reads padded token ids and their mask") from error
    finally:
        model.train(mode)
    if task_model.task != "causal-lm":
        return
    before, after = logits[0, :last], after[0, :last]
    exact = next(model.parameters()).dtype == torch.float32
    if (after - before).norm() > (1e-4 if exact else 0.02) * (before - before.mean()).norm():
        what = f"the tokens of {name} see those that come after them, which they are to predict"
        decoder = ", or `is_decoder: true` in its config.json" if hasattr(model.config, "is_decoder") else ""
        raise RecipeError.at("model.task", what, f"sequence-classification, a model that is a decoder{decoder}")


def reads_at_pad_token(model: Any) -> bool:
    """Whether the class is read at the last token that is not `config.pad_token_id`, as decoders of transformers do. Tried."""
    mode, own = model.training, model.config.get_text_config().pad_token_id
    model.eval()
    logits = []
    try:
        for pad in TRIED[1:]:
            _set_pad_token(model, pad)
            with torch.no_grad():
                logits.append(model(input_ids=torch.tensor([TRIED[:2]], device=model.device)).logits)
    except Exception as error:  # two tokens are not what it can read, so it is not a decoder; what is wrong shows elsewhere
        log.debug("where %s reads its class could not be tried: %s", type(model).__name__, error)
        return False
    finally:
        _set_pad_token(model, own)
        model.train(mode)
    return not torch.equal(*logits)


def _set_pad_token(model: Any, pad: int | None) -> None:
    """Some heads look into the configuration, some into that of the text part."""
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad


def _fillers(tokenizer: Any) -> list[int | None]:
    """Tokens to pad with, the tokenizer's own first."""
    return [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]


def _with_embedding(model: Any, tokens: Sequence[int | None]) -> int:
    """The first of the tokens that is one and has a row in the input embeddings; 0 where none has."""
    rows = getattr(compat.input_embeddings(model), "num_embeddings", math.inf)
    return next((token for token in tokens if token is not None and 0 <= token < rows), 0)


def use_kernels(model: Any) -> None:
    """Let the model use lorakit's kernels where they give what its own do."""
    # oneDNN compiles a kernel for every shape of a product; it reads how many to keep when it makes the first one. Measured: a
    # run of SmolLM2-135M peaks at 4.2 GB with 16384, 4.0 with 256 and 3.0 with 128, and is as fast; MiniLM needs 256, for 6 400
    # tokens a second instead of 5 600, and they take no room to speak of.
    large = sum(p.numel() for p in model.parameters()) > LARGE
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128" if large else "1024")
    use_attention(model)
    use_fast_elementwise(model)
    use_fast_rotary(model)


def skeleton(config: Any, spec: ModelSpec, labels: Labels | None) -> Any:
    """The model with weights that take no memory (`lorakit.trial.weightless`): names, shapes, and what can be tried."""
    build: Callable[..., Any] = AUTO_CLASS[spec.task].from_config
    described = with_labels(config, labels)
    model = weightless(lambda: build(described, trust_remote_code=spec.trust_remote_code))
    model.tie_weights()  # transformers 5.0 does not do it without memory
    return model


def with_labels(config: Any, labels: Labels | None) -> Any:
    """A copy of a model's configuration that says what the labels are; without labels a mere copy."""
    config = copy.deepcopy(config)
    if labels is None:
        return config
    config.num_labels = labels.count
    config.problem_type = "regression" if labels.regression else "single_label_classification"
    if not labels.regression:
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {name: i for i, name in enumerate(labels.names)}
    return config


def fit_head(labels: Labels, config: Any) -> tuple[Labels, bool, str | None]:
    """(the labels in the order of a base's head, whether that head is of use, what is to be said of it or None).

    config: the base's. Where it is a classifier of the same classes, their order is the base's, whatever case they are written
    in. Classes without names, `LABEL_0` or `0`, mean each other's by their number. Classes of other names are others, even if
    there are as many. A head of another size is transformers' affair: it starts a new one.
    """
    trained = any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])
    theirs = [str(name) for _, name in sorted((config.id2label or {}).items())] if trained else []
    ours = labels.names
    if not theirs or labels.regression or len(theirs) != len(ours):
        return labels, True, None
    by_name = {name.casefold(): name for name in ours}
    if len(by_name) == len(ours) and by_name.keys() == {name.casefold() for name in theirs}:
        ordered = [by_name[name.casefold()] for name in theirs]
        said = f"the base is a classifier of these classes: they are numbered as there, {', '.join(ordered)}"
        return Labels(ordered), True, None if ordered == ours else said
    if _numbered(theirs) or _numbered(ours):
        pairs = ", ".join(f"{their} is {our}" for their, our in zip(theirs, ours, strict=True))
        said = f"the base is a classifier, and its head is kept: classes are matched by number, {pairs}"
        return labels, True, None if _numbered(theirs) and _numbered(ours) else said
    said = f"the base is a classifier of other classes ({', '.join(theirs)}) than {', '.join(ours)}: a new head is started"
    return labels, False, said


def _numbered(names: list[str]) -> bool:
    """Whether classes are told by their numbers alone."""
    return any(names == [form.format(i) for i in range(len(names))] for form in ("LABEL_{}", "{}"))


def _start_head(model: Any, heads: list[str], classes: int) -> None:
    """Draw the last layer of the head anew, as transformers does where its shape does not fit."""
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    outside = (name for name in heads if not name.startswith(f"{model.base_model_prefix}."))
    for layer in (layer for name in outside for layer in model.get_submodule(name).modules()):
        if isinstance(layer, nn.Linear) and layer.out_features == classes:
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def head_names(model: Any, task: Task) -> list[str]:
    """Modules trained in full: what sits on top of the base model, and the base model's pooler."""
    if task != "sequence-classification":
        return []
    prefix = model.base_model_prefix
    heads = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    base = getattr(model, prefix, None)
    poolers = [name for name, child in base.named_children() if "pooler" in name] if isinstance(base, nn.Module) else []
    return [f"{prefix}.{name}" for name in poolers] + heads


def train_heads(task_model: TaskModel, in_float32: bool = True) -> list[nn.Parameter]:
    """Make the heads trainable, in float32 whatever the base's type; returns their parameters."""
    parameters: list[nn.Parameter] = []
    for name in task_model.heads:
        head = task_model.model.get_submodule(name).requires_grad_(True)
        if in_float32:
            head.float().register_forward_pre_hook(_inputs_to_float)
        parameters += head.parameters()
    return parameters


def _inputs_to_float(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def longest_input(config: Any, tokenizer: Any, spec: ModelSpec) -> int | None:
    """Tokens the model can read, or None when nothing says so: the positions of its tables, else those that its configuration
    tells, and no more than its tokenizer says."""
    limits = []
    positions = _positions(config, spec)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    if tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)


def _positions(config: Any, spec: ModelSpec) -> int | None:
    text = config.get_text_config()
    told = next((value for name in POSITIONS if (value := getattr(text, name, None))), None)
    try:
        tried = position_limit(skeleton(config, spec, None))
    except Exception as error:  # anything may go wrong in a model that reads more than token ids
        log.debug("how many positions %s has could not be tried: %s", type(config).__name__, error)
        return told
    return told if tried is None else tried


def _origin(source: Source, spec: ModelSpec) -> dict[str, Any]:
    origin: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if source.kind == "hub":
        origin["revision"] = source.revision or spec.revision
    else:
        origin["local_files_only"] = True
    return origin


def _explained(error: Exception, source: Source, spec: ModelSpec) -> RecipeError | RunError:
    """What went wrong while loading, told by the errors underneath: transformers wraps most of them in an OSError."""
    name, chain, cause = source.location, [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]

    def of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if of(GatedRepoError):
        return RunError(f"`{name}` is gated on the hub", "Accept its licence there and log in with `hf auth login`.")
    if of(RevisionNotFoundError):
        return RecipeError.at(
            "model.revision", f"`{name}` has no revision `{spec.revision}`", "a branch, tag or commit on the hub"
        )
    if of(RepositoryNotFoundError):
        return RecipeError.at("model.name_or_path", f"the hub has no model `{name}`", "owner/name as on the hub")
    if of(SafetensorError):
        return RunError(f"the weights of `{name}` are damaged: {reason}", "Fetch them again.")
    if of(HTTPError, LocalEntryNotFoundError) or (isinstance(error, OSError) and error.errno is not None):
        return RunError(f"`{name}` could not be fetched: {reason}", "Is the hub reachable, and is there room on the disk?")
    if "does not appear to have a file named" in str(error) and "safetensors" in str(error):
        remedy = "Convert it once with transformers' save_pretrained, and name the folder."
        return RunError(f"`{name}` has no safetensors weights, and pickled ones are not read", remedy)
    if "trust_remote_code" in str(error):
        return RecipeError.at("model.trust_remote_code", f"`{name}` needs code of its own", "true, once you have read it")
    return RecipeError.at("model.name_or_path", f"`{source.requested}` can not be loaded for {spec.task}: {reason}")


@contextlib.contextmanager
def _loading(source: Source, spec: ModelSpec) -> Iterator[None]:
    """transformers without its progress bars and reports; its errors in our words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, HTTPError) as error:
        raise _explained(error, source, spec) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def file_hashes(source: Source) -> dict[str, str]:
    """{file name: sha256} of a local model's weights and configuration; one from the hub has a commit instead."""
    folder = Path(source.location)
    return {file.name: sha256(file) for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])}
