"""Names that other programs give to fields of a configuration, for hints."""

SYNONYMS = {
    "optimizer": "opt",
    "optim": "opt",
    "learning_rate": "lr",
    "batch_size": "batch",
    "num_epochs": "epochs",
    "wd": "weight_decay",
    "data": "dataset",
    "arch": "model",
    "network": "model",
    "noise_rate": "noise",
    "noise_kind": "noise_type",
    "loss": "method",
    "algorithm": "method",
    "scheduler": "schedule",
    "m": "sam_m",
}
