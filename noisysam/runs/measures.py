"""The quantities that are measured in an evaluation, by their names in the record."""

EVALUATED = (
    "test_accuracy", "test_nll", "test_ece", "test_accuracy_1", "test_accuracy_2",
    "test_accuracy_ensemble", "val_accuracy",
    "clean_accuracy", "memorised", "recovered", "auroc",
)  # fmt: skip
