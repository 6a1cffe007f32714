from tests.contract.references.adam import step

__all__ = ["SETTINGS", "step"]
SETTINGS = [{"lr": 1e-2, "betas": (0.9, 0.5), "weight_decay": 0.1}]
