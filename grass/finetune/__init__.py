"""Fine-tuning runs: data, training with Hugging Face Trainer, evaluation and a run folder.

`grass finetune` calls `grass.finetune.job.start_run` and `resume_run`. The other modules can be used alone:

* `grass.finetune.options`: `FinetuneOptions`, the options of a run
* `grass.finetune.data`, `records`, `encoding`: from files to token ids
* `grass.finetune.arithmetic`, `demo`: the built-in task and its small model
* `grass.finetune.training`, `recording`, `stopping`: Trainer with `grass.GrassAdamW`, metrics, Ctrl-C
* `grass.finetune.evaluation`, `scoring`: held-out loss, generated answers and the rules that score them
* `grass.finetune.run_folder`, `picture`, `summary`: the results of a run
"""
