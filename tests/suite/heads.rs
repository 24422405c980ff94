//! Search for attention groups to remove, compared with an exhaustive search.

use crate::common::test_model::{Rng, TestModel};
use crate::common::{Silent, compare_logits, logits};
use putri_gguf::calibrate::Windows;
use putri_gguf::ggml::{Token, silence_logs};
use putri_gguf::model::{BlockWeights, Model};
use putri_gguf::pipeline::{HeadSettings, Settings, TuneSettings, run};
use putri_gguf::prune::GroupId;

const N_CTX: usize = 64;
const N_REMOVE: usize = 6;

/// Model, the windows on which groups are evaluated, and the predictions of the whole model.
struct Trial<'a> {
    model: &'a Model,
    windows: Vec<&'a [Token]>,
    dense: Vec<Vec<f32>>,
    n_vocab: usize,
}

impl Trial<'_> {
    fn block(&self, il: usize, removed: &[GroupId]) -> BlockWeights {
        let mut w = self.model.block(il).unwrap();
        let gone = |group: &usize| removed.contains(&GroupId { block: il, group: *group });
        let kept: Vec<usize> = (0..w.shape.n_head_kv).filter(|g| !gone(g)).collect();
        if kept.len() < w.shape.n_head_kv {
            w.keep_groups(&kept, self.model.hparams.head_dim);
        }
        w
    }

    /// Mean KL divergence from the whole model without these groups.
    fn divergence(&self, removed: &[GroupId]) -> f64 {
        let of_window = |(tokens, dense): (&&[Token], &Vec<f32>)| {
            let own = logits(self.model, tokens, 1, |il| self.block(il, removed));
            compare_logits(dense, &own, self.n_vocab).1
        };
        self.windows.iter().zip(&self.dense).map(of_window).sum::<f64>() / self.windows.len() as f64
    }

    /// Exhaustive search: removes the best of all removable groups, one at a time.
    fn greedy(&self, all: &[GroupId]) -> Vec<GroupId> {
        let mut removed: Vec<GroupId> = Vec::new();
        for _ in 0..N_REMOVE {
            let left = all.iter().filter(|id| {
                let here = removed.iter().filter(|r| r.block == id.block).count();
                !removed.contains(id) && (id.block > 0 || here + 1 < self.model.hparams.blocks[0].n_head_kv)
            });
            let scored = left.map(|id| (self.divergence(&[&removed[..], &[*id]].concat()), *id));
            removed.push(scored.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1);
        }
        removed
    }
}

#[test]
fn those_go_that_the_predictions_mind_least() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    for (arch, seed) in [("llama", 3), ("llama", 4), ("qwen2", 5)] {
        let blocks = vec![(4, 4, 64); 6];
        TestModel { arch, seed, blocks, biases: arch == "qwen2", ..TestModel::default() }.write(&path);
        let model = Model::open(&path).unwrap();
        let n_vocab = model.hparams.n_vocab;
        let tokens = (0..6 * N_CTX).map(|i| 3 + ((i * i * 31 + i * 7919) % 250) as Token).collect();
        let windows = Windows { n_ctx: N_CTX, tokens, n_fit: 5, n_held_out: 1, n_self: 0 };
        let settings = Settings {
            sparsity: 0.3,
            head_search: HeadSettings {
                groups: Some(N_REMOVE),
                tokens: 3 * N_CTX,
                ctx: N_CTX,
                ..HeadSettings::default()
            },
            tune: TuneSettings { passes: 0, ..TuneSettings::default() },
            ..Settings::default()
        };
        let plan = run(&model, &model, &windows, &settings, &mut (), &mut Silent).unwrap().plan;
        let all: Vec<GroupId> =
            (0..6).flat_map(|block| (0..4).map(move |group| GroupId { block, group })).collect();
        let found: Vec<GroupId> =
            all.iter().copied().filter(|id| !plan.blocks[id.block].groups.contains(&id.group)).collect();
        assert_eq!(found.len(), N_REMOVE);

        let judged = windows.sample_twice(settings.head_search.tokens, N_CTX);
        let mut trial =
            Trial { model: &model, windows: judged.chunks(N_CTX).collect(), dense: Vec::new(), n_vocab };
        trial.dense =
            trial.windows.iter().map(|tokens| logits(&model, tokens, 1, |il| trial.block(il, &[]))).collect();
        let best = trial.divergence(&trial.greedy(&all));
        let by_search = trial.divergence(&found);
        let mut rng = Rng(seed);
        let mut at_random = || {
            let mut left = all.clone();
            let any = (0..N_REMOVE).map(|_| left.swap_remove((rng.next_u64() % left.len() as u64) as usize));
            trial.divergence(&any.collect::<Vec<_>>())
        };
        let random = (0..8).map(|_| at_random()).sum::<f64>() / 8.0;
        println!(
            "{arch} {seed}: {by_search:.5} by the search, {best:.5} by trying all, {random:.5} at random"
        );
        assert!(by_search < best + 0.2 * (random - best), "{arch} {seed}: {by_search} {best} {random}");
    }
}

/// FFNs have half the attention's size, and half of them must be kept: they cannot give up a quarter of the
/// blocks.
#[test]
fn heads_go_where_feed_forwards_cannot_give_enough() {
    let cli = crate::common::cli::Cli::new();
    for (n_kv, heads) in [(2, "uniform"), (4, "uniform"), (8, "auto")] {
        TestModel { blocks: vec![(8, n_kv, 64); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
        let args = ["in.gguf", "out.gguf", "--sparsity", "0.25", "--heads", heads, "--force", "--json", "-q"];
        let said = cli.ok(&[&args[..], &["-c", "64", "--chunks", "4", "-t", "2"]].concat());
        let done: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        let reached = done["report"]["sparsity"].as_f64().unwrap();
        assert!(reached >= 0.25, "{n_kv} {heads}: {reached}");
    }
}
