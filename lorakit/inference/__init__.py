"""Generation: the loop over tokens, decoding steps, and key-value caches."""
