"""The libvirt driver on libvirt's own test driver, which needs no daemon. With QEMU: tests/contract."""

from __future__ import annotations

import pytest

from appliance.errors import NotSupported

libvirt = pytest.importorskip("libvirt")

TWIN = """<domain type="test"><name>twin</name><memory>8192</memory><os><type>hvm</type></os>
<devices><graphics type="vnc" port="-1" passwd="correct horse"/></devices></domain>"""


@pytest.fixture
def hypervisor():
    from appliance.hypervisor.libvirt import LibvirtHypervisor

    found = LibvirtHypervisor("test:///default")
    yield found
    found.close()


def whole(domain):
    return domain.call(lambda one: one.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))


def test_a_definition_that_is_changed_keeps_its_passwords(hypervisor):
    """I7: they are in no definition that a point keeps; and a console that had one is not open afterwards."""
    domain = hypervisor.define(TWIN)
    assert "correct horse" not in domain.definition()
    domain.change(lambda xml: xml.replace("8192</memory>", "4096</memory>"))
    assert "correct horse" in whole(domain) and "4096</memory>" in domain.definition()
    with pytest.raises(NotSupported, match="the definition"):
        domain.change(lambda _: "<domain/>")
    assert "correct horse" in whole(domain)
