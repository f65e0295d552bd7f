"""Fine-tuning as one job: data, training on top of Trainer, evaluation and a run folder.

The command line is a thin layer over `grass.finetune.job.start_run` and `resume_run`; the parts stand alone:

* `grass.finetune.options`: `FinetuneOptions`, every setting of a run
* `grass.finetune.data`, `encoding`: from files to token ids
* `grass.finetune.arithmetic`, `demo`: the built-in task and its small model
* `grass.finetune.training`, `recording`, `stopping`: Trainer with our optimizer, rows and Ctrl-C
* `grass.finetune.evaluation`: held-out loss, exact match
* `grass.finetune.run_folder`, `picture`, `summary`: what a run leaves behind
"""
