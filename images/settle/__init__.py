"""What a client does to itself after its first start on new hardware: stay bootable there, be somebody else if wanted.

    step     what a step is; finds them all
    steps/   one module and one shell script each: a schema, a description, what it is told
    lay      the chosen steps as files for /run, and the units of systemd that run them
    choice   what `--settle`, `--identity` and their like choose

Nothing is written before the hand-over, and nothing by us: the client's own programs work on its own disk. The runner
(`run.sh`) and what all steps may use (`lib.sh`) come along. Steps are done once for an image, in two phases: `identity`
before services start, `settle` when the system is up. What has failed is tried again at the next start from the image,
and so is what `settle` had to leave: a package that the client lacks may have been installed by then.

The power may go at any moment. So at each moment the boot volume starts the client, which needs its partition table and
root only, and what the disk starts by itself with is whole: a file is written beside the old one and renamed, and what
a program writes in place (GRUB, a file system) has a mark beside it until it is done, by which the next start knows it.
A disk whose initramfs is not for this hardware is never made to start before the boot volume.
"""
