"""Bootable images: any point, on other hardware, in one boot of the client's own kernel.

    hardware/   what the target is, with nothing booted on it         → Inventory
    guest/      what the point holds, read by a confined child        → Guest: a Tree and a Client
    drivers/    which modules go in, out, stay, each with its reason  → Plan
    template/   made beforehand: default kernel, own initrd userland  → Template, and the customised initrd
    media/      one build as UKI, ESP disk, ISO, USB stick, PXE files, boot disk
    verify/     a point is booted as a test: its machine, its report  → Verdict
    settle/     what the client does to itself once it runs           → Settings, of steps

`model` has the nouns and `tree` the one way to look at a guest's files. Nothing here writes to the restored disk: what
the image needs to change it lays over the running system's `/run`.
"""
