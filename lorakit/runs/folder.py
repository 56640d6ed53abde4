"""Names of the files in a run folder, and of the recipe keys that do not affect a run."""

RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
RANKS = "ranks.jsonl"
RESULT = "result.json"
WARNINGS = "warnings.jsonl"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
BEST = "best"
TOKENIZER = "tokenizer"
LOGS = "logs"

# Keys whose change extends a resumed run.
LENGTH_KEYS = {"train.max_steps", "train.num_train_epochs"}
# Keys that may differ between a run and its resumption, since they do not affect the results.
FREE_KEYS = {
    "output_dir",
    "data.cache",
    "data.streaming",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.report_to",
    "train.resume_from_checkpoint",
    "distributed.strategy",
    "distributed.timeout_seconds",
}
