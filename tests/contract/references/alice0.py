from tests.contract.references.alice import step

__all__ = ["SETTINGS", "step"]
SETTINGS = [{"lr": 0.02, "rank": 3, "leading": 1, "weight_decay": 0.1}, {"lr": 0.02, "rank": 3, "leading": 3}]
