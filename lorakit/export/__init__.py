"""Exports of a trained adapter: lorakit's own form, PEFT's two forms, and the merged model."""
