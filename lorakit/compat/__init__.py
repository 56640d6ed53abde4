"""Compatibility: everything of other packages that a minor version may rename, move or drop, such
as keywords, private names and attributes of their objects. Only this folder names them, each in the
file of its package.

If one is gone, a RunError names the package, its version, the missing name and the versions that
lorakit was tested with, since going on would silently give another result. Heavy packages are
imported only when needed.
"""

from __future__ import annotations

from lorakit.compat.caches import (
    cache_argument,
    cache_bytes,
    cache_in,
    cache_name,
    cache_of,
    check_cache_methods,
    new_cache,
    new_tokens,
)
from lorakit.compat.hub import (
    http_error,
    hub_only_from_cache,
    prepared_data,
)
from lorakit.compat.lookup import (
    attribute,
    part,
)
from lorakit.compat.quantisers import (
    bitsandbytes,
    torchao,
)
from lorakit.compat.tokenizers import (
    backend,
    decode,
)
from lorakit.compat.torch import (
    check_apply,
    compile_for_any_size,
    dispatch_mode,
    foreach,
    fused_adamw,
    has_forward_hooks,
    mark_dynamic,
    process_store,
    sizes_restored,
    storage_number,
    tree_leaves,
    weak_storage,
)
from lorakit.compat.transformers import (
    attention_name,
    can_checkpoint,
    caps_scores,
    checkpoint,
    checkpoint_around_forward,
    input_embeddings,
    old_experts,
    register_attention,
    sdpa_attention,
    set_attention,
    takes_attention,
)
from lorakit.compat.typer import (
    command_line_error,
)
from lorakit.compat.versions import (
    gone,
    moved,
    oldest_tested,
    tested,
    untested,
)

__all__ = [
    "attention_name",
    "attribute",
    "backend",
    "bitsandbytes",
    "cache_argument",
    "cache_bytes",
    "cache_in",
    "cache_name",
    "cache_of",
    "can_checkpoint",
    "caps_scores",
    "check_apply",
    "check_cache_methods",
    "checkpoint",
    "checkpoint_around_forward",
    "command_line_error",
    "compile_for_any_size",
    "decode",
    "dispatch_mode",
    "foreach",
    "fused_adamw",
    "gone",
    "has_forward_hooks",
    "http_error",
    "hub_only_from_cache",
    "input_embeddings",
    "mark_dynamic",
    "moved",
    "new_cache",
    "new_tokens",
    "old_experts",
    "oldest_tested",
    "part",
    "prepared_data",
    "process_store",
    "register_attention",
    "sdpa_attention",
    "set_attention",
    "sizes_restored",
    "storage_number",
    "takes_attention",
    "tested",
    "torchao",
    "tree_leaves",
    "untested",
    "weak_storage",
]
