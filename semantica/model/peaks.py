"""Matrix rates of NVIDIA's cards by the exact name that CUDA gives them: dense, fp32 sums, no sparsity.

Sources, each rate without sparsity (half of the figure with it where a sheet prints only that one):
- H100, H200, B200, A100, A30, A40, A10, A2, L4, L40, L40S, V100, T4: NVIDIA's data sheet of the product; GH200, GB200:
  of the superchip, by GPU. A10G: AWS' page of g5 instances and NVIDIA's data sheet.
- RTX A6000 to A4000 and GeForce RTX 30: NVIDIA, "Ampere GA102 GPU architecture", appendix A.
- RTX 6000 Ada and GeForce RTX 40: NVIDIA, "Ada GPU architecture", appendices A and B.
- RTX PRO 6000 Blackwell and GeForce RTX 50: NVIDIA, "RTX Blackwell (PRO) GPU architecture", appendix A.

Cards of a family that those papers leave out follow from the same arithmetic: tensor cores x operations a clock x boost
clock (GeForce RTX 30, 40 and 50: 128 operations with fp32 sums). Laptop chips are left out, since their clock is what
their maker chose, and so are parts of a card (MIG).
"""

import torch

# TFLOP/s in bf16 and in fp16
HALF = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200 480GB": 989.4,
    "GH200 144G HBM3e": 989.4,
    "H100 80GB HBM3": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "A100-PCIE-40GB": 312.0,
    "A100 80GB PCIe": 312.0,
    "A800-SXM4-80GB": 312.0,
    "A800 80GB PCIe": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "A10": 125.0,
    "A10G": 70.0,
    "A2": 18.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX A4000": 76.7,
    "RTX 6000 Ada Generation": 364.2,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.9,
    "GeForce RTX 3060": 25.5,
    "GeForce RTX 3060 Ti": 32.4,
    "GeForce RTX 3070": 40.6,
    "GeForce RTX 3070 Ti": 43.5,
    "GeForce RTX 3080": 59.5,
    "GeForce RTX 3080 Ti": 68.2,
    "GeForce RTX 3090": 71.0,
    "GeForce RTX 3090 Ti": 80.0,
    "GeForce RTX 4060": 30.2,
    "GeForce RTX 4060 Ti": 44.1,
    "GeForce RTX 4070": 58.3,
    "GeForce RTX 4070 SUPER": 71.0,
    "GeForce RTX 4070 Ti": 80.2,
    "GeForce RTX 4070 Ti SUPER": 88.2,
    "GeForce RTX 4080": 97.5,
    "GeForce RTX 4080 SUPER": 104.4,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 4090 D": 147.1,
    "GeForce RTX 5060": 38.4,
    "GeForce RTX 5060 Ti": 47.4,
    "GeForce RTX 5070": 61.7,
    "GeForce RTX 5070 Ti": 87.9,
    "GeForce RTX 5080": 112.6,
    "GeForce RTX 5090": 209.5,
}
# of cards that have no bf16
FP16_ONLY = {
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0,
    "Tesla T4": 65.0,
}


def card_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a card's matrix units, or None where no source is known for it.

    Args:
        name: as `torch.cuda.get_device_name` gives it, with or without the maker.
    """
    tables = {torch.bfloat16: (HALF,), torch.float16: (HALF, FP16_ONLY)}.get(dtype, ())
    rates = [table[short] for table in tables if (short := name.removeprefix("NVIDIA ")) in table]
    return rates[0] * 1e12 if rates else None
