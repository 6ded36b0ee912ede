from m3ae_fast.ops.varlen_attention.op import varlen_attention, varlen_attention_qkvpacked

__all__ = ["varlen_attention", "varlen_attention_qkvpacked"]
