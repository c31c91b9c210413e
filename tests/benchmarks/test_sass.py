"""The main loop of a kernel's listing, by which `machine_code` counts its instructions."""

import pytest

pytest.importorskip("triton")
from support.sass import kind_of, main_loop

LISTING = """
.L_x_0:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R0] ;
.L_x_2:
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R147], desc[UR16][R4.64] ;
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT ;
        /*0050*/                   IMAD.WIDE R2, R3, 0x4, R4 ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0090*/                   STG.E desc[UR4][R2.64], R1 ;
"""


def test_the_main_loop_is_the_innermost_with_most_matrix_instructions() -> None:
    assert main_loop(LISTING) == {"copies": 1, "matrix": 1, "other": 2}
    assert main_loop("        /*0000*/                   EXIT ;\n") == {}


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("IGMMA", "matrix"), ("HMMA", "matrix"), ("UTCQMMA", "matrix"), ("STS", "to shared"), ("LDSM", "from shared"),
        ("LDGSTS", "copies"), ("LDGDEPBAR", "waiting"), ("FFMA2", "float"), ("LDGX", "other"),
    ],
)  # fmt: skip
def test_an_opcode_has_one_kind(opcode: str, kind: str) -> None:
    assert kind_of(opcode) == kind
