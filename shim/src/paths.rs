//! Where things are: programs and guest files found from where `ampoule` itself lies, and the folders of a
//! user or of root. Pure: the environment is an argument.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
};

/// What the environment and the command line say.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// This program's file.
    pub exe: PathBuf,
    /// Effective user id; 0 is root of this host, or of a container that is one's whole system.
    pub uid: u32,
    pub root: Option<OsString>,
    pub vmm: Option<OsString>,
    pub fsd: Option<OsString>,
    pub kernel: Option<OsString>,
    pub guest: Option<OsString>,
    pub home: Option<OsString>,
    pub xdg_data: Option<OsString>,
    pub xdg_runtime: Option<OsString>,
    pub xdg_config: Option<OsString>,
    pub auth_file: Option<OsString>,
    pub docker_config: Option<OsString>,
}

impl Environment {
    /// Of this process.
    pub fn current() -> Self {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty());
        Self {
            exe: std::env::current_exe().unwrap_or_default(),
            uid: user(
                rustix::process::geteuid().as_raw(),
                &fs::read_to_string("/proc/self/uid_map").unwrap_or_default(),
                var("XDG_RUNTIME_DIR").as_deref(),
            ),
            root: var("AMPOULE_ROOT"),
            vmm: var("AMPOULE_VMM"),
            fsd: var("AMPOULE_FSD"),
            kernel: var("AMPOULE_KERNEL"),
            guest: var("AMPOULE_GUEST"),
            home: var("HOME"),
            xdg_data: var("XDG_DATA_HOME"),
            xdg_runtime: var("XDG_RUNTIME_DIR"),
            xdg_config: var("XDG_CONFIG_HOME"),
            auth_file: var("REGISTRY_AUTH_FILE"),
            docker_config: var("DOCKER_CONFIG"),
        }
    }
}

/// Whose folders are meant. Who is root in a user namespace and has the runtime folder of an ordinary user is that one, as
/// Podman without root's help is (user_namespaces(7), /proc/[pid]/uid_map).
fn user(uid: u32, map: &str, runtime: Option<&OsStr>) -> u32 {
    let mut root =
        map.lines().map(str::split_whitespace).filter(|line| line.clone().next() == Some("0"));
    let outside = root.next().and_then(|mut line| line.nth(1)?.parse().ok());
    match (uid, outside, runtime) {
        (0, Some(outside), Some(runtime)) if runtime != "/run/user/0" => outside,
        _ => uid,
    }
}

/// Every path of an installation and of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// `PREFIX/bin/ampoule-vmm`
    pub vmm: PathBuf,
    /// `PREFIX/bin/ampoule-fsd`
    pub fsd: PathBuf,
    /// `PREFIX/share/ampoule/vmlinux`
    pub kernel: PathBuf,
    /// `PREFIX/share/ampoule/guest.erofs`
    pub guest: PathBuf,
    /// The image store: `/var/lib/ampoule`, or `~/.local/share/ampoule` for an ordinary user.
    pub store: PathBuf,
    /// What lives as long as sandboxes do: `/run/ampoule`, or below `XDG_RUNTIME_DIR`.
    pub state: PathBuf,
    /// `/etc/ampoule/config.toml`, then the user's, which wins.
    pub config: Vec<PathBuf>,
    /// Docker's `config.json` with the credentials for registries.
    pub credentials: Option<PathBuf>,
}

impl Paths {
    /// `PREFIX` is the folder above the one this program lies in. `AMPOULE_VMM`, `AMPOULE_FSD`, `AMPOULE_KERNEL`
    /// and `AMPOULE_GUEST` name single files; `AMPOULE_ROOT` moves the store and, into its `run`, the state.
    pub fn new(env: &Environment) -> Self {
        let prefix = env.exe.parent().and_then(Path::parent).unwrap_or(Path::new("/usr/local"));
        let file = |given: &Option<OsString>, default: &str| {
            given.as_ref().map_or_else(|| prefix.join(default), PathBuf::from)
        };
        let (store, state) = folders(env);
        Self {
            vmm: file(&env.vmm, "bin/ampoule-vmm"),
            fsd: file(&env.fsd, "bin/ampoule-fsd"),
            kernel: file(&env.kernel, "share/ampoule/vmlinux"),
            guest: file(&env.guest, "share/ampoule/guest.erofs"),
            store,
            state,
            config: config(env),
            credentials: credentials(env),
        }
    }
}

fn config(env: &Environment) -> Vec<PathBuf> {
    let home = env.home.as_ref().map(|home| Path::new(home).join(".config"));
    let user = env.xdg_config.as_ref().map(PathBuf::from).or(home);
    let folders = [Some(PathBuf::from("/etc")), user].into_iter().flatten();
    folders.map(|folder| folder.join("ampoule/config.toml")).collect()
}

fn credentials(env: &Environment) -> Option<PathBuf> {
    let home = env.home.as_ref().map(|home| Path::new(home).join(".docker"));
    let folder = env.docker_config.as_ref().map(PathBuf::from).or(home);
    let file = env.auth_file.as_ref().map(PathBuf::from);
    file.or(folder.map(|folder| folder.join("config.json")))
}

fn folders(env: &Environment) -> (PathBuf, PathBuf) {
    if let Some(root) = &env.root {
        return (root.into(), Path::new(root).join("run"));
    }
    if env.uid == 0 {
        return ("/var/lib/ampoule".into(), "/run/ampoule".into());
    }
    let home = env.home.clone().map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    let data = env.xdg_data.as_ref().map_or_else(|| home.join(".local/share"), PathBuf::from);
    // Directly in /tmp, whose sticky bit keeps others from putting a folder of theirs in its place.
    let state = match &env.xdg_runtime {
        Some(runtime) => Path::new(runtime).join("ampoule"),
        None => PathBuf::from(format!("/tmp/ampoule-{}", env.uid)),
    };
    (data.join("ampoule"), state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn installed() -> Environment {
        Environment { exe: "/usr/local/bin/ampoule".into(), ..Default::default() }
    }

    #[test]
    fn files_are_found_from_where_the_program_lies() {
        let paths = Paths::new(&installed());
        assert_eq!(paths.vmm, Path::new("/usr/local/bin/ampoule-vmm"));
        assert_eq!(paths.kernel, Path::new("/usr/local/share/ampoule/vmlinux"));
        assert_eq!(paths.guest, Path::new("/usr/local/share/ampoule/guest.erofs"));
    }

    #[test]
    fn root_of_a_user_namespace_is_who_made_it_unless_it_is_a_whole_system() {
        let (whole, podmans) = ("         0          0 4294967295\n", "0 1000 1\n1 100000 65536\n");
        for (uid, map, runtime, expected) in [
            (0, whole, None, 0),
            (0, whole, Some("/run/user/0"), 0),
            (0, podmans, Some("/run/user/1000"), 1000),
            (0, "0 100000 65536\n", None, 0),
            (0, "0 100000 65536\n", Some("/run/user/0"), 0),
            (1000, whole, Some("/run/user/1000"), 1000),
            (1000, "", None, 1000),
        ] {
            assert_eq!(
                user(uid, map, runtime.map(OsStr::new)),
                expected,
                "{uid} {map} {runtime:?}"
            );
        }
    }

    #[test]
    fn the_environment_names_single_files() {
        let env = Environment {
            vmm: Some("/x/vmm".into()),
            kernel: Some("/x/vmlinux".into()),
            ..installed()
        };
        let paths = Paths::new(&env);
        assert_eq!(
            (paths.vmm, paths.kernel, paths.guest),
            ("/x/vmm".into(), "/x/vmlinux".into(), "/usr/local/share/ampoule/guest.erofs".into())
        );
    }

    #[test]
    fn configuration_and_credentials_are_where_others_have_them() {
        let home = Environment { home: Some("/home/u".into()), ..installed() };
        let docker = Environment { docker_config: Some("/d".into()), ..home.clone() };
        let file = Environment { auth_file: Some("/f.json".into()), ..docker.clone() };
        let xdg = Environment { xdg_config: Some("/x".into()), ..home.clone() };
        for (env, user, credentials) in [
            (home, "/home/u/.config/ampoule/config.toml", "/home/u/.docker/config.json"),
            (docker, "/home/u/.config/ampoule/config.toml", "/d/config.json"),
            (file, "/home/u/.config/ampoule/config.toml", "/f.json"),
            (xdg, "/x/ampoule/config.toml", "/home/u/.docker/config.json"),
        ] {
            let paths = Paths::new(&env);
            assert_eq!(paths.config, [Path::new("/etc/ampoule/config.toml"), Path::new(user)]);
            assert_eq!(paths.credentials, Some(credentials.into()));
        }
    }

    #[test]
    fn folders_of_root_of_users_and_of_ampoule_root() {
        let root = installed();
        let user = Environment { uid: 1000, home: Some("/home/u".into()), ..installed() };
        let xdg = Environment {
            xdg_data: Some("/d".into()),
            xdg_runtime: Some("/run/user/1000".into()),
            ..user.clone()
        };
        let moved = Environment { root: Some("/r".into()), ..user.clone() };
        for (env, store, state) in [
            (root, "/var/lib/ampoule", "/run/ampoule"),
            (user, "/home/u/.local/share/ampoule", "/tmp/ampoule-1000"),
            (xdg, "/d/ampoule", "/run/user/1000/ampoule"),
            (moved, "/r", "/r/run"),
        ] {
            let paths = Paths::new(&env);
            assert_eq!((paths.store, paths.state), (store.into(), state.into()));
        }
    }
}
