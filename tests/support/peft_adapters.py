"""Adapters that PEFT itself made, with factors that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

NAMES = ["q_proj", "v_proj", "down_proj"]
AUTO = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}


def make_peft(
    folder: Path,
    base: Path,
    dtype: torch.dtype = torch.float32,
    task: str = "CAUSAL_LM",
    classes: int | None = None,
    **keys: Any,
) -> Any:
    """The model of an adapter that is saved in `folder`; every trained tensor is random and of
    `dtype` in the file."""
    torch.manual_seed(0)
    more = {} if classes is None else {"num_labels": classes}
    model = AUTO[task].from_pretrained(base, **more)
    keys = {"r": 4, "lora_alpha": 9, "target_modules": NAMES, "task_type": task} | keys
    found = get_peft_model(model, LoraConfig(**keys)).eval()
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn_like(parameter) / 4).to(dtype)
    found.save_pretrained(folder)
    if dtype != torch.float32:
        found.float()
    if task == "SEQ_CLS":
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return found
