//! Compute devices other than the CPU: GPUs of the built-in backends, and other machines.

use super::GgmlError;

use super::system::{init_once, static_text};
use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, CString, c_char};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Device, by its index in ggml's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(usize);

/// Compute resources that graphs run on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compute {
    /// Number of ggml's own threads, for operations that the devices do not support. Without devices, graphs run
    /// on the threads of rayon's pool.
    pub n_threads: usize,
    /// Devices; an empty list means the CPU alone. Each of several devices gets its share of the blocks.
    pub devices: Vec<Device>,
}

impl From<usize> for Compute {
    /// Uses the CPU, which has `n_threads` threads.
    fn from(n_threads: usize) -> Compute {
        Compute { n_threads, devices: Vec::new() }
    }
}

/// Description of a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Device.
    pub device: Device,
    /// Name in arguments, such as `CUDA0`, `Vulkan0`, `RPC0`.
    pub name: String,
    /// Description by its backend.
    pub description: String,
    /// Free bytes of its memory.
    pub free: u64,
    /// Total bytes of its memory.
    pub total: u64,
}

impl Device {
    pub(super) fn raw(self) -> sys::ggml_backend_dev_t {
        // SAFETY: the index is that of a device, and ggml never removes devices.
        unsafe { sys::ggml_backend_dev_get(self.0) }
    }

    /// Free and total bytes of its memory; 0 if the backend cannot tell.
    pub fn memory(self) -> (u64, u64) {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are written before the call returns.
        unsafe { sys::ggml_backend_dev_memory(self.raw(), &mut free, &mut total) };
        (free as u64, total as u64)
    }
}

/// Memory of this machine in bytes, if the CPU backend can tell.
pub fn total_memory() -> Option<u64> {
    init_once();
    // SAFETY: null is checked; both numbers are written before the call returns.
    unsafe {
        let cpu = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        if cpu.is_null() {
            return None;
        }
        let (mut free, mut total) = (0, 0);
        sys::ggml_backend_dev_memory(cpu, &mut free, &mut total);
        (total > 0).then_some(total as u64)
    }
}

/// All devices but the CPU, including those of servers that were added.
pub fn devices() -> Vec<DeviceInfo> {
    init_once();
    // SAFETY: indices are below the count; names and descriptions are C strings that live as long as the
    // device.
    unsafe {
        let all = (0..sys::ggml_backend_dev_count()).map(|i| (i, sys::ggml_backend_dev_get(i)));
        let beside = all.filter(|(_, raw)| {
            let kind = sys::ggml_backend_dev_type(*raw);
            kind == sys::GGML_BACKEND_DEVICE_TYPE_GPU || kind == sys::GGML_BACKEND_DEVICE_TYPE_IGPU
        });
        beside
            .map(|(i, raw)| {
                let (free, total) = Device(i).memory();
                DeviceInfo {
                    device: Device(i),
                    name: static_text(sys::ggml_backend_dev_name(raw)).into(),
                    description: static_text(sys::ggml_backend_dev_description(raw)).into(),
                    free,
                    total,
                }
            })
            .collect()
    }
}

/// Bytes that this process's graphs and their weights take on all devices: current, and peak.
static TAKEN: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

/// Accounted bytes on devices; the drop gives them back.
#[derive(Default)]
pub(super) struct Taken(u64);

impl Taken {
    pub(super) fn resize(&mut self, bytes: u64) {
        let before = TAKEN.fetch_add(bytes, Ordering::Relaxed);
        TAKEN.fetch_sub(self.0, Ordering::Relaxed);
        PEAK.fetch_max(before + bytes - self.0, Ordering::Relaxed);
        self.0 = bytes;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.resize(0);
    }
}

/// Peak bytes that this process's graphs and their weights took on all devices; llama.cpp's own are not
/// counted.
pub fn device_memory_peak() -> u64 {
    PEAK.load(Ordering::Relaxed)
}

/// Function of the RPC backend, if that is built in.
fn rpc_function(name: &CStr) -> Result<*mut std::ffi::c_void, GgmlError> {
    init_once();
    // SAFETY: C strings; null is checked.
    unsafe {
        let backend = sys::ggml_backend_reg_by_name(c"RPC".as_ptr());
        let function = if backend.is_null() {
            std::ptr::null_mut()
        } else {
            sys::ggml_backend_reg_get_proc_address(backend, name.as_ptr())
        };
        if function.is_null() { Err(GgmlError::NoRpc) } else { Ok(function) }
    }
}

/// Adds the devices of the machine at `endpoint` (`host:port`) to [`devices`]; it runs llama.cpp's
/// rpc-server or [`serve`].
///
/// # Errors
/// [`GgmlError::NoRpc`] if that backend is not built in, [`GgmlError::Server`] if nobody answers.
pub fn add_server(endpoint: &str) -> Result<(), GgmlError> {
    type AddServer = unsafe extern "C" fn(*const c_char) -> sys::ggml_backend_reg_t;
    let function = rpc_function(c"ggml_backend_rpc_add_server")?;
    let refused = |problem: String| GgmlError::Server(endpoint.into(), problem);
    // ggml takes addresses of version 4 only, and aborts if it cannot connect.
    let mut addresses = endpoint.to_socket_addrs().map_err(|e| refused(e.to_string()))?;
    let address = addresses.find(std::net::SocketAddr::is_ipv4);
    let address = address.filter(|_| endpoint.matches(':').count() == 1);
    let address = address.ok_or_else(|| refused("is not HOST:PORT with an IPv4 address".into()))?;
    TcpStream::connect_timeout(&address, Duration::from_secs(5)).map_err(|e| refused(e.to_string()))?;
    let name = CString::new(endpoint).map_err(|_| refused("has a NUL in its name".into()))?;
    // SAFETY: the function of that name has that type (ggml-rpc.h); the registry takes the returned entry.
    unsafe {
        let add: AddServer = std::mem::transmute(function);
        let server = add(name.as_ptr());
        if server.is_null() {
            return Err(refused("offers no devices".into()));
        }
        sys::ggml_backend_register(server);
    }
    Ok(())
}

/// Serves this machine's CPU to other machines until the process ends.
///
/// # Errors
/// [`GgmlError::NoRpc`] if that backend is not built in, [`GgmlError::Server`] if it cannot listen at
/// `endpoint`.
pub fn serve(endpoint: &str, n_threads: usize) -> Result<(), GgmlError> {
    type StartServer =
        unsafe extern "C" fn(*const c_char, *const c_char, usize, usize, *mut sys::ggml_backend_dev_t);
    let function = rpc_function(c"ggml_backend_rpc_start_server")?;
    let refused = |problem: &str| GgmlError::Server(endpoint.into(), problem.into());
    let name = CString::new(endpoint).map_err(|_| refused("has a NUL in its name"))?;
    // The engine does not say why it cannot listen.
    drop(std::net::TcpListener::bind(endpoint).map_err(|e| refused(&format!("cannot be listened at: {e}")))?);
    // SAFETY: the function of that name has that type (ggml-rpc.h); the arguments live as long as it runs.
    unsafe {
        let mut cpu = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        if cpu.is_null() {
            return Err(GgmlError::Backend("CPU"));
        }
        let start: StartServer = std::mem::transmute(function);
        start(name.as_ptr(), std::ptr::null(), n_threads, 1, &mut cpu);
    }
    Err(refused("cannot be listened at"))
}
