"""How big a model is: stated by the user, read from its config.json, or guessed by its name, in this order."""

from __future__ import annotations

from pagedserve_operator.errors import ModelShapeUnknown
from pagedserve_operator.shapes.config import from_config
from pagedserve_operator.shapes.model import FROM_NAME, ModelShape, from_architecture
from pagedserve_operator.shapes.names import from_name
from pagedserve_operator.spec import Json, Model

__all__ = ["FROM_NAME", "ModelShape", "choose_shape", "from_architecture", "from_config", "from_name"]


def choose_shape(model: Model, config: Json | None) -> ModelShape:
    """The best known shape: the user's, the config's where it can be read, the name's.

    Raises ModelShapeUnknown where all three are silent.
    """
    if model.architecture is not None:
        return from_architecture(model.architecture)
    if config is not None:
        try:
            return from_config(config)
        except ModelShapeUnknown as error:
            return _from_name_or(model.uri, error)
    return from_name(model.uri)


def _from_name_or(uri: str, error: ModelShapeUnknown) -> ModelShape:
    try:
        return from_name(uri)
    except ModelShapeUnknown:
        raise error from None
