"""What a method tells the loop: which parameters it trains, and what it minimises."""

from typing import Any

from torch import Tensor, nn

from halfbyte.heal.objective import Objective
from halfbyte.heal.states import Batch, prediction


class Method:
    """What a fine-tune trains and minimises. This base trains nothing and compares predictions; methods change what they need."""

    name = "method"
    objective = Objective()  # what an error of the prediction counts

    def trained(self) -> dict[str, float]:
        """Names of the student's parameters to train, with the factor of the learning rate for each."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """The method's own settings, for the fingerprint; plain JSON."""
        return {"name": self.name}

    def before_step(self, step: int) -> None:
        """Called before the forward pass of every optimizer step."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of every row of a batch, float32 (rows,); `model` is the student, wrapped where several processes train it."""
        return self.objective(prediction(model(*batch.args, **batch.kwargs)), batch)
