"""Exports of a trained adapter: lorakit's own form, PEFT's two forms, the sparse form and the
merged model."""
