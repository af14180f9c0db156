"""Fields of a config that differ from layer to layer."""

from transformers import PretrainedConfig


def config_of_layer(config: PretrainedConfig, index: int | str) -> PretrainedConfig:
    """A config whose fields are those of a layer, or of all layers of a type, where they differ by layer."""
    return config.per_layer_config[index] if fields_by_layer(config) else config


def layer_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config of each layer where their fields differ, and the one config of all where they do not."""
    if not fields_by_layer(config):
        return [config]
    return [config.per_layer_config[index] for index in range(config.num_hidden_layers)]


def fields_by_layer(config: PretrainedConfig) -> set[str]:
    """Names of the fields that `per_layer_config` changes; transformers raises where they are read of the whole model."""
    layers = vars(config).get("_heterogeneity_spec")
    if layers is None:
        return set()
    skips = any(overrides.get("skip") for overrides in layers.per_layer_overrides.values())
    return set(layers.per_layer_attributes) | ({"skip"} if skips else set())
