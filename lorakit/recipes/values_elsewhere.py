"""Names that the values of a recipe's keys have in other tools; those of the keys are in
`lorakit.recipes.elsewhere`."""

from __future__ import annotations

from lorakit.data.formats import what_a_format_is
from lorakit.spec import Meant

_FORMATS = what_a_format_is()
# {key: {other tools' name of a value, in lower case: (nearest value or None, how it differs)}}.
_NO_FP16 = (
    None,
    "lorakit computes in bf16 or fp32, not in fp16: `auto` takes what the machine is good at.",
)
_NO_SCHEDULE = (None, "lorakit has no counterpart.")
VALUES_ELSEWHERE: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "model.task": {
        **dict.fromkeys(
            (
                "seq_2_seq_lm",
                "seq2seq",
                "token_cls",
                "token-classification",
                "question_ans",
                "question-answering",
            ),
            (None, "lorakit has no counterpart."),
        ),
    },
    "model.quantization.backend": {
        "bnb": ("bitsandbytes", None),
        "ao": ("torchao", None),
        **dict.fromkeys(
            ("hqq", "eetq", "gptq", "awq", "quanto"), (None, "lorakit has no counterpart.")
        ),
    },
    "method.init_lora_weights": {
        **dict.fromkeys(("true", "default", "kaiming_uniform"), ("kaiming", None)),
        "loftq": ("qera", "It is LoftQ's start, weighted by what the layers read."),
        **dict.fromkeys(
            ("pissa", "olora", "corda", "lora_ga", "gaussian", "orthogonal", "pissa_niter_16"),
            (None, "lorakit has no counterpart."),
        ),
    },
    "data.format": {
        **dict.fromkeys(("json", "jsonl", "csv", "tsv", "parquet", "txt"), (None, _FORMATS)),
    },
    "train.precision": {
        **dict.fromkeys(("fp16", "float16", "half", "16-mixed", "16-true"), _NO_FP16),
        **dict.fromkeys(("bfloat16", "bf16-mixed", "bf16-true", "torch.bfloat16"), ("bf16", None)),
        **dict.fromkeys(
            ("float32", "32", "32-true", "no", "none", "full", "torch.float32"), ("fp32", None)
        ),
    },
    "train.lr_scheduler_type": {
        "cosine_with_restarts": ("cosine", "lorakit's goes down once, without restarts."),
        "cosine_with_min_lr": ("cosine", "lorakit's goes down to 0."),
        "constant_with_warmup": ("constant", "train.warmup_steps says how long the warm-up is."),
        "linear_with_warmup": ("linear", "train.warmup_steps says how long the warm-up is."),
        "cosine_with_warmup": ("cosine", "train.warmup_steps says how long the warm-up is."),
        **dict.fromkeys(
            (
                "polynomial",
                "inverse_sqrt",
                "reduce_lr_on_plateau",
                "warmup_stable_decay",
                "wsd",
                "exponential",
                "step",
                "rex",
            ),
            _NO_SCHEDULE,
        ),
    },
    "data.loss_on": {
        **dict.fromkeys(("response", "responses", "answer", "output"), ("completion", None)),
        "last_turn": ("last_assistant", None),
        **dict.fromkeys(("full", "everything", "prompt+completion"), ("all", None)),
    },
}
BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def value_called(key: str, value: str) -> Meant | None:
    """Meaning of another tool's `value` of the dotted `key`; None if it is unknown."""
    found = VALUES_ELSEWHERE.get(key, {}).get(value.lower())
    return None if found is None else Meant(*found)
