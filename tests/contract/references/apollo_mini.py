from tests.contract.references.apollo import WITHOUT_DRAWS, step

__all__ = ["WITHOUT_DRAWS", "step"]

FIRST_STEP = (0.4, 3)  # one random direction stands for five or eight
SETTINGS = [{"weight_decay": 0.1, "scale_front": True}, {"scale_type": "channel", "limit": None}]
