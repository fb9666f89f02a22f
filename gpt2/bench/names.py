"""The names that a graph's keys and values have, shared by who writes it and who runs it (the latter without torch)."""


def past_names(layers: int) -> list[str]:
    """The inputs; the outputs say `present` instead of `past_key_values`."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def present_name(past: str) -> str:
    """The output that belongs to an input."""
    return past.replace("past_key_values", "present")
