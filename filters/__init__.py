"""What stands between QEMU and us: nbdkit plugins. Glue only: they import `appliance`, and nothing imports them."""

__all__: list[str] = []
