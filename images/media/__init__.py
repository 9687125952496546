"""One build as files that firmware starts. A medium is one module here with a `MEDIUM`; a new one is one new file.

    base   what a medium gets and what it is; finds them all        pe       sections and signatures of EFI programs
    fat    file systems for firmware; disks with a partition table  menu     configuration of GRUB, iPXE, pxelinux

    uki    kernel and initrd in one EFI program                     iso, usb   CD and stick, BIOS and UEFI
    esp    a disk for UEFI                                          disk       a disk for both
    pxe    files for a network boot server
"""
