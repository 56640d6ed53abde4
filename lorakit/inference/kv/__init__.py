"""Key-value caches whose tokens are kept by a policy: in full, in 8 or 4 bits, or for a while.

`slots` decides where every token is, `storage` holds and quantises the tensors, `attention` reads
them; `store` puts the three together, and `policy_cache` makes it a cache of transformers.
"""
