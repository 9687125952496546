"""An image whose root comes from a served point, while the local disks of the machine fill.

    layout      where on the client's disks its partitions and its root are             → Layout
    tls         the certificates of one session: its own authority, server, client
    settings    what the initrd is told, with these programs:                           → images.template.Settings

    hook.sh     sourced by init: which local disk is which; puts the client's disks together from what is served
    keeper.sh   stays beside the client's system: network, links that wait for a server, the way from link to disk
    fill.sh     of keeper: copies, or lets the kernel's mirror fill; tells the server

The server's side is `appliance.restore.serve`. The client's system needs nothing for it: no program, no file on its
disks, and no device of it stays when the local disks are complete.
"""
