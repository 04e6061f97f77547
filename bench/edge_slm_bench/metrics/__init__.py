"""Metrics of predictions and answers, and the texts that they are measured on."""
