"""Programs that judge a tokenizer: metrics, baselines, the benchmark and its report."""
