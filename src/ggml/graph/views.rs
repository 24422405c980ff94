//! Operations that move values: views, copies and joins.

use super::{Graph, TensorId};
use llama_cpp_sys_2 as sys;

impl Graph<'_> {
    /// Same elements with other sizes (a view).
    pub fn reshape(&mut self, a: TensorId, ne: [usize; 4]) -> TensorId {
        assert!(self.contiguous(a) && self.ne(a).iter().product::<usize>() == ne.iter().product::<usize>());
        let [n0, n1, n2, n3] = ne.map(|n| n as i64);
        // SAFETY: contiguous, with the same number of elements.
        let raw = unsafe { sys::ggml_reshape_4d(self.ctx.as_ptr(), self.raw(a), n0, n1, n2, n3) };
        self.push(raw)
    }

    /// Permutes dimensions: dimension i of `a` becomes dimension `axes[i]` of the result (a view).
    pub fn permute(&mut self, a: TensorId, axes: [usize; 4]) -> TensorId {
        let mut seen = [false; 4];
        axes.iter().for_each(|&x| seen[x] = true);
        assert_eq!(seen, [true; 4], "axes {axes:?} are no permutation");
        let [x, y, z, w] = axes.map(|n| n as i32);
        // SAFETY: a permutation of the four axes.
        let raw = unsafe { sys::ggml_permute(self.ctx.as_ptr(), self.raw(a), x, y, z, w) };
        self.push(raw)
    }

    /// Exchanges the first two dimensions (a view).
    pub fn transpose(&mut self, a: TensorId) -> TensorId {
        self.permute(a, [1, 0, 2, 3])
    }

    /// Contiguous copy of `a`.
    pub fn cont(&mut self, a: TensorId) -> TensorId {
        // SAFETY: any tensor can be copied.
        let raw = unsafe { sys::ggml_cont(self.ctx.as_ptr(), self.raw(a)) };
        self.push(raw)
    }

    /// Elements `start .. start + n` along dimension `dim` (a view).
    pub fn slice(&mut self, a: TensorId, dim: usize, start: usize, n: usize) -> TensorId {
        let mut ne = self.ne(a);
        assert!(dim < 4 && n > 0 && start + n <= ne[dim]);
        if n == ne[dim] {
            return a;
        }
        ne[dim] = n;
        let [n0, n1, n2, n3] = ne.map(|n| n as i64);
        // SAFETY: the slice lies inside `a`, whose strides the view keeps. Types with blocks are not sliced
        // along ne[0]: their stride nb[0] is that of a block.
        let raw = unsafe {
            let src = self.raw(a);
            let nb = (*src).nb;
            assert!(nb[0] == sys::ggml_type_size((*src).type_), "a view keeps no stride along ne[0]");
            assert!(dim > 0 || sys::ggml_blck_size((*src).type_) == 1);
            sys::ggml_view_4d(self.ctx.as_ptr(), src, n0, n1, n2, n3, nb[1], nb[2], nb[3], start * nb[dim])
        };
        self.push(raw)
    }

    /// Concatenates `a` and `b` along dimension `dim`.
    pub fn concat(&mut self, a: TensorId, b: TensorId, dim: usize) -> TensorId {
        let (x, y) = (self.ne(a), self.ne(b));
        assert!((0..4).all(|d| d == dim || x[d] == y[d]), "concat of {x:?} and {y:?} along {dim}");
        // SAFETY: equal in all other dimensions.
        let raw = unsafe { sys::ggml_concat(self.ctx.as_ptr(), self.raw(a), self.raw(b), dim as i32) };
        self.push(raw)
    }
}
