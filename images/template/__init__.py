"""What is made before anybody asks: Debian's kernel, our own initrd, the boot loaders. And the initrd for one plan.

    build      a template as a folder; its manifest          apt        Debian packages, unpacked beside the system
    pack       the same as one file                          userland   programs of the initrd      init.sh  its init
    initrd     the initrd for a plan                         loaders    boot loaders of the media
    append     the other way: behind the client's own        settings   what init and the client's system are told
    modules    kernel modules as files                       newc       the archive's format
"""
