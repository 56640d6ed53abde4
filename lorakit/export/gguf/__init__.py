"""GGUF files, as llama.cpp reads them: an adapter alone, or a merged model."""
