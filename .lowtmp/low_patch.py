import torch
import qcompile.kernels.quantize.reference as R
_old=R.scale_pair
class T(float): pass
def scale_pair(amax,q,global_scale=None):
    largest=torch.full((),q.format.max,device=amax.device)
    if q.scale.name=="absmax": return amax/largest, amax/largest, largest/amax
    if q.scale.name=="absmax_pow2":
        e=torch.frexp(largest/amax).exponent-1
        s=R._finite_or_nan(R._power_of_two(-e),amax); return s,s,R._power_of_two(e)
    if q.scale.name=="e4m3":
        stored=(amax/largest/global_scale).clamp(max=448.0).to(torch.float8_e4m3fn)
        s=R.load_scale(stored,q,global_scale); return stored,s,torch.where(s==0,0.0,1.0/s)
    return _old(amax,q,global_scale)
R.scale_pair=scale_pair
