"""The classes of transformers that load a model for each task."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

AUTO_CLASS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}
