"""The verbs: arguments in, one call of the service, records out. `app.VERBS` tells which module has which."""

__all__: list[str] = []
